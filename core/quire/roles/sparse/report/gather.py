"""From a trained dictionary and its data to what a report shows."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.datasets.activations.codes import CodeStore, CodeWriter, Fired
from quire.datasets.activations.feed import as_batch
from quire.errors import ConfigError, DataError
from quire.roles.sparse.card import resting
from quire.roles.sparse.report import effects, samples
from quire.roles.sparse.report.found import Context, Latent, Report
from quire.roles.sparse.result import histogram

BINS = 24


@dataclass
class Wanted:
    """How much a report shows.

    Attributes:
        split: Of the data.
        tokens: Tokens read.
        count: Latents shown, spread evenly from the rarest to the most frequent live one.
        numbers: These latents instead.
        contexts: Contexts of a latent, each of another row of the source.
        width: Characters of a context, half of them on either side of the peak.
        logits: Tokens listed as raised and as lowered.
    """

    split: str = "val"
    tokens: int = 50_000
    count: int = 40
    numbers: Sequence[int] = ()
    contexts: int = 12
    width: int = 110
    logits: int = 8


@torch.no_grad()
def gather(encoder: Any, decoder: Any, data: Any, wanted: Wanted, title: str) -> Report:
    """Read ``wanted.tokens`` tokens, then look closer at the chosen latents.

    Args:
        encoder: A SparseEncoder.
        decoder: Its decoder; None leaves logits and heads out.
        data: An Activations data module, with a subject or a folder.
        wanted: How much.
        title: The page's.

    Raises:
        ConfigError: data that is not Activations, or a latent that isn't there.
        DataError: no latent fired.
    """
    if not hasattr(data, "forwards"):
        raise ConfigError(
            f"a report shows where latents fire in a source: {type(data).__name__} has none; use Activations"
        )
    beyond = [n for n in wanted.numbers if not 0 <= n < encoder.latents]
    if beyond:
        raise ConfigError(f"latent {beyond[0]} is outside 0..{encoder.latents - 1}")
    with tempfile.TemporaryDirectory() as folder, resting(encoder):
        store, read, by_head = _read(encoder, data, wanted, Path(folder) / "codes")
        numbers = list(wanted.numbers) or choose(store.counts, wanted.count)
        density, edges = histogram(store.counts, read)
        latents = [_latent(store.latent(n), n, read) for n in numbers]
        report = Report(title, _about(data, encoder, wanted, read), density, edges, latents)
        _contexts(report, store, data, wanted)
        _effects(report, decoder, data, wanted, by_head)
    return report


def _read(encoder: Any, data: Any, wanted: Wanted, folder: Path) -> tuple[CodeStore, int, Tensor | None]:
    """Codes of tokens from all over the split, how many tokens, and firings by head [F,H] at a heads site."""
    chunks = data.chunks(wanted.split)
    device = next(encoder.parameters()).device
    if data.subject is not None:
        data.subject.to(device)
    widths = [data.widths()[s] for s in data.sites]
    writer = CodeWriter(folder, encoder.latents, "report")
    read, by_head = 0, None
    for what in chunks.plan(0, True):  # from all over the split
        batch = as_batch({k: v.to(device) for k, v in chunks.read(what).items()}, data.sites, widths)
        codes = encoder(batch)
        writer.add(codes, batch)
        read += len(batch["activation"])
        if "head" in batch:
            active = (codes.dense() > 0).float()
            heads = torch.nn.functional.one_hot(batch["head"]).float()
            by_head = (0 if by_head is None else by_head) + active.T @ heads
        if read >= wanted.tokens:
            break
    try:
        return writer.finish(), read, by_head
    except DataError as error:
        raise DataError(f"no latent fired in {read} tokens of the {wanted.split} split: nothing to show") from error


def choose(counts: Tensor, most: int) -> list[int]:
    """Live latents, evenly from the rarest to the most frequent, in the order of their numbers.

    Raises:
        ConfigError: fewer than 1 asked for.
    """
    if most < 1:
        raise ConfigError(f"a report shows at least 1 latent, got {most}")
    live = counts.nonzero().squeeze(1)
    ranked = live[counts[live].argsort(stable=True)]
    places = torch.linspace(0, len(ranked) - 1, min(most, len(ranked))).round().long()
    return sorted(ranked[places].tolist())


def _latent(fired: Fired, number: int, read: int) -> Latent:
    values = fired.activations
    peak = float(values.max()) if len(values) else 0.0
    bins = torch.histc(values, BINS, 0, peak).long().tolist() if peak > 0 else []
    return Latent(number, len(values), len(values) / read, peak, bins)


def _about(data: Any, encoder: Any, wanted: Wanted, read: int) -> dict[str, str]:
    selector = type(encoder.selector).__name__
    k = getattr(encoder.selector, "k", None)
    said = {"site": ", ".join(data.sites), "latents": f"{encoder.latents:,}"}
    said["selector"] = selector if k is None else f"{selector}, k = {k}"
    if data.subject is not None:
        said = {"subject": data.subject.name, **said}
    return {**said, "read": f"{read:,} tokens of the {wanted.split} split"}


def _contexts(report: Report, store: CodeStore, data: Any, wanted: Wanted) -> None:
    """The strongest contexts of every latent, one a row of the source."""
    if data.subject is None:
        report.notes.append("No contexts: a harvested folder holds no source; name the subject beside it.")
        return
    source = samples.Samples(data, wanted.split)
    for latent in report.latents:
        fired = store.latent(latent.number)
        for row, at, peak in strongest(fired, wanted.contexts):
            own = fired.rows == row
            values = dict(zip(fired.positions[own].tolist(), fired.activations[own].tolist()))
            context = Context(peak, (row, at))
            source.fill(context, values, wanted.width)
            latent.contexts.append(context)
    report.notes += source.notes


def strongest(fired: Fired, most: int) -> list[tuple[int, int, float]]:
    """(row, position, activation) of the largest firings, at most one of each row."""
    found: dict[int, tuple[int, int, float]] = {}
    for place in fired.activations.argsort(descending=True, stable=True).tolist():
        row = int(fired.rows[place])
        if row not in found:
            found[row] = (row, int(fired.positions[place]), float(fired.activations[place]))
        if len(found) == most:
            break
    return list(found.values())


def _effects(report: Report, decoder: Any, data: Any, wanted: Wanted, by_head: Tensor | None) -> None:
    subject = data.subject
    numbers = torch.tensor([latent.number for latent in report.latents])
    place = None if subject is None else subject.sites.place(data.sites[0])
    if by_head is not None:
        report.heads = "share of its firings at each head"
        shares = by_head.cpu()[numbers]
        shares = shares / shares.sum(1, keepdim=True).clamp(min=1)
        _keep_heads(report, shares)
    if decoder is None or subject is None or place is None:
        return
    rows = decoder.W_dec.detach()[numbers.to(decoder.W_dec.device)].float()
    target = getattr(data, "target_site", None)
    place = subject.sites.place(target) if target else place
    if place.heads and place.side == "input":
        report.heads = "norm of each head's slice of its decoder row, over their sum"
        _keep_heads(report, effects.head_shares(rows, place.heads).cpu())
    made = None
    if place.block >= 0:
        made = effects.logit_effects(effects.residual_rows(rows, place), subject)
    if made is None or data.tokenizer is None:
        if subject.language:
            report.notes.append(
                "No logits: the site is no named one, or the subject shows no unembedding of its width."
            )
        return
    for latent, row in zip(report.latents, made.cpu()):
        for name, sign in (("up", 1), ("down", -1)):
            values, ids = (sign * row).topk(min(wanted.logits, len(row)))
            texts = [samples.text_of(data.tokenizer, i) for i in ids.tolist()]
            setattr(latent, name, list(zip(texts, (sign * values).tolist())))


def _keep_heads(report: Report, shares: Tensor) -> None:
    for latent, row in zip(report.latents, shares.tolist()):
        latent.heads = row
