"""The metric card: one definition of every number about a sparse dictionary, and the function that measures them.

``measure`` judges any encoder and decoder on any feed. Plugins add rows by ``CardRow`` or by a plain function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quire.contracts import Batch, Component
from quire.data import DataModule
from quire.errors import ConfigError, DataError
from quire.roles.sparse.codes import SparseCodes
from quire.roles.sparse.coherence import coherence
from quire.roles.sparse.ranks import ranks
from quire.roles.sparse.result import Card, Row, histogram
from quire.roles.sparse.splices import Splicer
from quire.roles.sparse.sums import Sums, joined
from quire.roles.sparse.sweeps import Spread, at_l0, matched, matched_text, pareto, spread

__all__ = [
    "Card",
    "CardRow",
    "Row",
    "Seen",
    "Spread",
    "at_l0",
    "histogram",
    "matched",
    "matched_text",
    "measure",
    "pareto",
    "spread",
]


@dataclass
class Seen:
    """One evaluated batch, as rows that add to the card see it.

    Attributes:
        batch: Its fields, one row a token.
        codes: The encoder's; ``dense()`` gives [N,F].
        x: [N,D] what is rebuilt, in the units of the data.
        made: [N,D] the rebuild.
        encoder: The encoder.
        decoder: The decoder.
    """

    batch: Batch
    codes: Any
    x: Tensor
    made: Tensor
    encoder: Any
    decoder: Any


class CardRow:
    """What adds rows to the card: subclass it beside Metric, Objective or Part, and put that into the model.

    On several processes ``card_rows`` is called on all of them and sums what it kept itself.
    """

    def card_begin(self) -> None:
        """Forget an earlier evaluation."""

    def card_see(self, seen: Seen) -> Mapping[str, Tensor] | None:
        """Look at a batch; [N] values by name are averaged over all tokens by the card, None adds nothing."""
        return None

    def card_rows(self) -> Mapping[str, float]:
        """Further numbers by name, at the end."""
        return {}


Extra = CardRow | Callable[[Seen], Mapping[str, Tensor]]
"""A CardRow, or a function of a batch that gives [N] values by name, whose mean over all tokens is a row."""


@torch.no_grad()
def measure(
    encoder: Any,
    decoder: Any,
    feed: DataModule | Iterable[Batch],
    subject: Any = None,
    site: str | None = None,
    tokens: int = 100_000,
    splice: bool = True,
    extra: Sequence[Extra] = (),
    *,
    split: str = "val",
    window: int | None = None,
    name: str = "",
    seed: int = 0,
) -> Card:
    """The card of one dictionary. Parameters, train mode and counters stay as they are.

    Args:
        encoder: batch with ``activation`` [N,D] → codes (SparseCodes, or a tensor [N,F]).
        decoder: codes → [N,D].
        feed: A data module, or batches: rows [N,D], or [B,T,D] with a mask. Splices of plain batches need ``tokens``.
        subject: The frozen model that is spliced; the feed's own by default.
        site: Where; the feed's first site by default.
        tokens: Evaluated tokens, of all processes together; also the tokens that are spliced, in whole rows.
        splice: Also run the subject with the rebuild, zeros and the mean at the site.
        extra: What adds rows: CardRows, or functions of a ``Seen`` that give [N] values by name.
        split: Of a data module.
        window: Tokens of training without firing after which ``dead_training`` counts a latent; None leaves that out.
        name: Of the arm, for plots and tables.
        seed: Of its training.

    Returns:
        The card.

    Raises:
        ConfigError: ``tokens`` below 1, or a feed without ``activation``.
        DataError: no token to evaluate.
    """
    if tokens < 1:
        raise ConfigError(f"the card's tokens must be at least 1, got {tokens}")
    data: Any = feed if isinstance(feed, DataModule) else None
    sites = list(getattr(data, "sites", []))
    site = site or (sites[0] if sites else None)
    subject = subject if subject is not None else getattr(data, "subject", None)
    share = -(-tokens // ranks())
    for added in extra:
        if isinstance(added, CardRow):
            added.card_begin()
    with resting(encoder, decoder):
        batches: Any = feed if data is None else _prepared(data, split)
        whole = joined(_sums(encoder, decoder, batches, site, share, extra))
        if whole is None:
            raise DataError(f"the card has no token to evaluate: the {split} split gave none")
        numbers = whole.numbers()
        for added in extra:
            if isinstance(added, CardRow):
                numbers |= {k: float(v) for k, v in added.card_rows().items()}
        about: dict[str, Any] = {"tokens": whole.count, "latents": len(whole.fired)}
        about |= {"dead_window": f"{whole.count} evaluated tokens"}
        if window is not None and hasattr(decoder, "dead"):
            numbers["dead_training"] = float(decoder.dead(window).float().mean())
            about["dead_training_window"] = f"{window} training tokens"
        if isinstance(getattr(decoder, "W_dec", None), Tensor):
            numbers["coherence"] = float(coherence(decoder.W_dec))
        notes = _dead_note(whole)
        if splice:
            said = _splices(encoder, decoder, feed, subject, site, whole, share, split, numbers, about)
            notes += [said] if said else []
    if site is not None:
        about["site"] = site
    if subject is not None:
        about["subject"] = getattr(subject, "name", type(subject).__name__)
    density, edges = histogram(whole.fired, whole.count)
    return Card(numbers, density, edges, name, seed, about, notes)


@contextmanager
def resting(*parts: Any) -> Iterator[None]:
    """Eval mode within the block, for whatever is a module; then as before."""
    modes = {m: m.training for p in parts if isinstance(p, nn.Module) for m in p.modules()}
    try:
        for part in parts:
            if isinstance(part, nn.Module):
                part.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _prepared(data: DataModule, split: str) -> Iterator[Batch]:
    """A split's batches, transformed as in validation."""
    generator = torch.Generator().manual_seed(data.seed)
    for batch in getattr(data, f"{split}_dataloader")():
        yield data.transform(batch, generator, training=False)


def _sums(
    encoder: Any, decoder: Any, batches: Iterable[Batch], site: str | None, tokens: int, extra: Sequence[Extra]
) -> Sums | None:
    total, device = None, _device(encoder)
    left = tokens
    for batch in batches:
        rows = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in _as_rows(batch, site, left).items()}
        if not len(rows["activation"]):
            continue
        codes = as_codes(encoder(rows))
        made = decoder(codes)
        x = rows.get("target", rows["activation"]).to(made.dtype)
        seen = Seen(rows, codes, x, made, encoder, decoder)
        more: dict[str, Tensor] = {}
        for added in extra:
            more |= (added.card_see(seen) if isinstance(added, CardRow) else added(seen)) or {}
        own = Sums.of(x, made, codes.l0(), codes.fired(), more)
        total = own if total is None else total + own
        left -= len(x)
        if left <= 0:
            break
    return total


def _as_rows(batch: Batch, site: str | None, most: int) -> Batch:
    """One row a real token, of one site, at most ``most`` of them."""
    from quire.datasets.activations.forwards import rows_of

    if "activation" not in batch:
        raise ConfigError(f"the card needs the batch field 'activation'; the feed gives {', '.join(batch)}")
    if site is not None and f"activation@{site}" in batch:
        own = {n: batch[f"{n}@{site}"] for n in ("activation", "grad") if f"{n}@{site}" in batch}
        batch = {**batch, **own}
    if batch["activation"].ndim == 3:
        full = {"mask": torch.ones(batch["activation"].shape[:2], dtype=torch.bool, device=batch["activation"].device)}
        full |= {"index": torch.arange(len(batch["activation"]))}
        batch = dict(rows_of({**full, **batch}))
    count = len(batch["activation"])
    if count <= most:
        return batch
    return {k: v[:most] if isinstance(v, Tensor) and v.ndim and len(v) == count else v for k, v in batch.items()}


def as_codes(codes: Any) -> Any:
    """Codes that can be counted; a plain tensor [N,F] is one row of latents a token."""
    return SparseCodes(codes, None, codes.shape[-1]) if isinstance(codes, Tensor) else codes


def _splices(
    encoder: Any,
    decoder: Any,
    feed: Any,
    subject: Any,
    site: str | None,
    whole: Sums,
    tokens: int,
    split: str,
    numbers: dict[str, float],
    about: dict[str, Any],
) -> str:
    """Add the spliced losses; a sentence where there can be none."""
    if subject is None or site is None:
        return "no splices: the feed has no subject to splice into"
    if not subject.language and getattr(subject.model, "objective", None) is None:
        return f"no splices: subject {subject.name} gives no next-token loss and has no objective of its own"
    batches = feed
    if hasattr(feed, "forwards"):
        chunks = feed.forwards(split)
        rank = torch.distributed.get_rank() if ranks() > 1 else 0
        batches = (chunks.rows.batch(i) for i in chunks.plan(0, False, rank, ranks()))
    elif isinstance(feed, DataModule):
        return f"no splices: {type(feed).__name__} gives no rows of the subject's own input"
    subject.to(_device(encoder))
    mean = whole.mean.float().to(subject.device)
    splicer = Splicer(
        encoder,
        lambda codes: decoder(as_codes(codes)),
        subject,
        site,
        mean,
        getattr(feed, "target_site", None),
        bool(getattr(feed, "drop_special", False)),
        needs_grad(encoder, feed),
    )
    found = splicer.run(batches, tokens)
    if not found.targets:
        return "no splices: the feed's batches hold no target to predict"
    numbers |= found.numbers()
    about["targets"] = int(found.targets)
    nan = [n for n in ("recovered_zero", "recovered_mean") if math.isnan(numbers[n])]
    return f"{' and '.join(nan)}: the ablation changes the loss by less than 0.001 nats" if nan else ""


def needs_grad(encoder: Any, feed: Any) -> bool:
    """Whether an encoder reads ``grad`` in evaluation, or its feed gives it."""
    parts = encoder.modules() if isinstance(encoder, nn.Module) else ()
    return bool(getattr(feed, "with_grad", False)) or any(
        "grad" in part.reads("test") for part in parts if isinstance(part, Component)
    )


def _dead_note(whole: Sums) -> list[str]:
    if whole.count < 10 * len(whole.fired):
        return [f"dead is counted in {whole.count} tokens for {len(whole.fired)} latents: rare latents count as dead"]
    return []


def _device(encoder: Any) -> torch.device:
    first = next(encoder.parameters(), None) if isinstance(encoder, nn.Module) else None
    return torch.device("cpu") if first is None else first.device
