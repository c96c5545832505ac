"""What a subject loses when a dictionary's rebuild, nothing, or the mean stands at a site."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.distributed import all_gather_object
from torch.nn.functional import cross_entropy

from quire.contracts import Batch
from quire.roles.sites.subject import Subject
from quire.roles.sparse.ranks import ranks
from quire.roles.sparse.sums import over

LEAST = 1e-3
"""A loss gap below this, in nats, is no ground to stand on: what is divided by it is NaN."""


@dataclass
class Gaps:
    """Losses summed over targets, in nats.

    Attributes:
        targets: Next tokens that were predicted (or samples, where the subject has a loss of its own).
        clean: Of the subject as it is.
        spliced: With the dictionary in between.
        zero: With zeros at the site.
        mean: With the mean activation of the evaluation set there.
        kl: KL(clean||spliced) of the next-token distributions; NaN where there are none.
    """

    targets: float = 0.0
    clean: float = 0.0
    spliced: float = 0.0
    zero: float = 0.0
    mean: float = 0.0
    kl: float = 0.0

    def __add__(self, other: Gaps) -> Gaps:
        return Gaps(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def numbers(self) -> dict[str, float]:
        """Losses per target, their differences, and the share of an ablation's damage that the dictionary undoes."""
        clean, spliced, zero, mean = (over(v, self.targets) for v in (self.clean, self.spliced, self.zero, self.mean))
        return {
            "ce_clean": clean,
            "ce_spliced": spliced,
            "ce_zero": zero,
            "ce_mean": mean,
            "delta_ce": spliced - clean,
            "recovered_zero": recovered(clean, spliced, zero, "zero"),
            "recovered_mean": recovered(clean, spliced, mean, "mean"),
            "kl": over(self.kl, self.targets),
        }


def recovered(clean: float, spliced: float, ablated: float, what: str) -> float:
    """(ablated - spliced) / (ablated - clean): 1 is no damage, 0 as much as the ablation's.

    NaN, with a warning, where the ablation changes the loss by less than 0.001 nats.
    """
    below = ablated - clean
    if abs(below) < LEAST:
        warnings.warn(
            f"CE recovered against {what} ablation is NaN: the ablation changes the loss by {below:.2g} nats only, so"
            " this site can't tell",
            stacklevel=2,
        )
        return math.nan
    return (ablated - spliced) / below


class Splicer:
    """Runs a subject clean, spliced and ablated on the same batches.

    Args:
        encoder: Of the dictionary.
        decoder: Of the dictionary.
        subject: The frozen model.
        site: What the encoder reads.
        mean: [D] what mean ablation puts there.
        target_site: What the decoder rebuilds, where that is another site.
        drop_special: Special tokens were not fed, so they are left as they are.
        needs_grad: The encoder reads ``grad``.
    """

    def __init__(
        self,
        encoder: Any,
        decoder: Any,
        subject: Subject,
        site: str,
        mean: Tensor,
        target_site: str | None = None,
        drop_special: bool = False,
        needs_grad: bool = False,
    ) -> None:
        self.encoder, self.decoder, self.subject, self.site = encoder, decoder, subject, site
        self.target_site, self.drop_special, self.needs_grad = target_site, drop_special, needs_grad
        self.mean = mean

    def run(self, batches: Iterable[Batch], tokens: int) -> Gaps:
        """Sums over batches until ``tokens`` real tokens have been read, of all processes."""
        total, seen = Gaps(), 0
        for batch in batches:
            if seen >= tokens:
                break
            total += self.gaps(batch)
            mask = batch.get("mask", batch.get("tokens"))
            seen += int(mask.count_nonzero()) if mask is not None and mask.dtype == torch.bool else _size(batch)
        if ranks() > 1:
            everyone: list[Any] = [None] * ranks()
            all_gather_object(everyone, total)
            total = sum(everyone[1:], everyone[0])
        return total

    def gaps(self, batch: Batch) -> Gaps:
        """Sums of one batch of the subject's own input."""
        from quire.datasets.activations.forwards import described, moved

        subject, sites, place = self.subject, self.subject.sites, self.target_site or self.site
        batch = subject.aligned(moved(batch, subject.device))[0]
        if subject.language:
            found = sites.read(batch, [self.site], grad=self.needs_grad, output=True)
            logits = found.output
            about = described(subject, {"index": torch.arange(_rows(batch)), **batch}, found.values[self.site])
            keep = ~about["special"] if self.drop_special else torch.ones_like(about["mask"])
            clean, targets = next_losses(logits, batch), _targets(batch)
            extra = {"grad": found.grads[self.site].float()} if self.needs_grad else {}
            if found.values[self.site].ndim == 3:
                extra |= {n: about[n] for n in ("token", "position", "special", "instance") if n in about}
            spliced = self._spliced(found.values[self.site], keep, extra)
        else:
            clean, logits, targets = self._outcome(batch)
            keep, spliced = None, self._spliced(None, None, {})
        made = Gaps(targets=float(targets), clean=clean)
        with spliced:
            made.spliced, changed, _ = self._outcome(batch)
        made.kl = math.nan if logits is None or changed is None else kl(logits, changed, batch)
        for name, value in (("zero", torch.zeros_like(self.mean)), ("mean", self.mean)):
            with sites.replace(place, _constant(value, keep)):
                setattr(made, name, self._outcome(batch)[0])
        return made

    def _spliced(
        self, x: Tensor | None, keep: Tensor | None, extra: Mapping[str, Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        sites = self.subject.sites
        if self.target_site is not None and x is not None:
            rows = {"activation": x.flatten(0, -2).float(), **{k: v.flatten(0, 1) for k, v in extra.items()}}
            rebuilt = self.decoder(self.encoder(rows)).view(*x.shape[:-1], -1)
            return sites.replace(self.target_site, lambda old: _kept(old, rebuilt.to(old.dtype), keep))
        through = _Through(self.encoder, self.decoder, keep)
        return sites.splice(self.site, through.encode, through.decode, keep_error=False, fields=extra)

    def _outcome(self, batch: Batch) -> tuple[float, Tensor | None, int]:
        with torch.no_grad():
            if self.subject.language:
                logits = self.subject.run(batch)
                return next_losses(logits, batch), logits, _targets(batch)
            size = _rows(batch)
            return float(self.subject.loss(batch)[0]) * size, None, size


class _Through:
    """A dictionary that leaves some rows as they are."""

    def __init__(self, encoder: Any, decoder: Any, keep: Tensor | None) -> None:
        self.encoder, self.decoder, self.keep = encoder, decoder, keep
        self.rows = torch.empty(0)

    def encode(self, batch: Batch) -> Any:
        """Codes; the rows are remembered."""
        self.rows = batch["activation"]
        return self.encoder(batch)

    def decode(self, codes: Any) -> Tensor:
        """The rebuild where a row is kept, the row itself elsewhere."""
        made: Tensor = self.decoder(codes).view(self.rows.shape)
        if self.keep is None or len(self.rows) % self.keep.numel():
            return made
        keep = self.keep.flatten().repeat_interleave(len(self.rows) // self.keep.numel())
        return torch.where(keep[:, None], made, self.rows)


def _kept(old: Tensor, new: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None or keep.shape != old.shape[:2]:
        return new
    return torch.where(keep.view(*keep.shape, *[1] * (old.ndim - 2)), new, old)


def _constant(value: Tensor, keep: Tensor | None) -> Any:
    return lambda old: _kept(old, value.to(old).expand_as(old), keep)


@torch.no_grad()
def next_losses(logits: Tensor, batch: Batch) -> float:
    """Cross-entropy of each next real token, in nats, summed in fp64: a difference of two sums is small beside them."""
    target = batch["tokens"][:, 1:].to(logits.device)
    target = target.masked_fill(~_predicting(batch, logits.device), -100)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = cross_entropy(wide[:, :-1].flatten(0, 1), target.flatten(), reduction="none")
    return float(losses.cpu().double().sum())


@torch.no_grad()
def kl(clean: Tensor, changed: Tensor, batch: Batch, rows: int = 2048) -> float:
    """KL(clean||changed) of next-token distributions, summed over places that have a target, in nats."""
    places = _predicting(batch, clean.device).flatten().nonzero().squeeze(1)
    total = 0.0
    p_all, q_all = clean[:, :-1].flatten(0, 1), changed[:, :-1].flatten(0, 1)
    for part in places.split(rows):
        p, q = p_all[part].float().log_softmax(-1), q_all[part].float().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum(1).cpu().double().sum())
    return total


def _predicting(batch: Batch, device: torch.device) -> Tensor:
    tokens, mask = batch["tokens"], batch.get("mask")
    if mask is None:
        return torch.ones(tokens.shape[0], tokens.shape[1] - 1, dtype=torch.bool, device=device)
    return (mask[:, 1:] & mask[:, :-1]).to(device)


def _targets(batch: Batch) -> int:
    return int(_predicting(batch, batch["tokens"].device).sum())


def _rows(batch: Batch) -> int:
    return next(len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim)


def _size(batch: Batch) -> int:
    tokens = batch.get("tokens")
    return _rows(batch) if tokens is None else tokens.numel()
