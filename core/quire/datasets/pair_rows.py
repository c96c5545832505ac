"""Pairs of id rows as batches: a source and a target apart, or both in one row for a decoder-only model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from quire.contracts import Batch
from quire.data import mix
from quire.datasets.text import ragged

PAIR_FIELDS = ("source", "source_mask", "tokens", "mask")
CAUSAL_FIELDS = ("tokens", "mask", "prompt_length", "source_span")


def pair_fields(
    sources: list[list[int]],
    targets: list[list[int]],
    pad: int,
    causal: bool,
    wide: int | None = None,
    long: int | None = None,
) -> dict[str, Tensor]:
    """Fields of pairs of id rows.

    Args:
        sources: Ids of the sources, no special ids.
        targets: Ids of the targets, from the start token to the end token.
        pad: Id of padding.
        causal: One row a pair: source, then target; the prompt ends behind the target's start token.
        wide: Width S of ``source``; the longest row when null.
        long: Width T of ``tokens``, of the target part alone in causal rows; the longest row when null.

    Returns:
        ``source`` [B,S] and ``tokens`` [B,T] with their masks; causal: ``tokens`` and ``mask`` [B,S+T],
        ``prompt_length`` [B] and ``source_span`` [B,2].
    """
    if not causal:
        given, given_mask = ragged(sources, wide or _longest(sources), pad)
        tokens, mask = ragged(targets, long or _longest(targets), pad)
        return {"source": given, "source_mask": given_mask, "tokens": tokens, "mask": mask}
    rows = [[*s, *t] for s, t in zip(sources, targets)]
    tokens, mask = ragged(rows, wide + long if wide and long else _longest(rows), pad)
    lengths = torch.tensor([len(s) for s in sources])
    span = torch.stack([torch.zeros_like(lengths), lengths], 1)
    return {"tokens": tokens, "mask": mask, "prompt_length": lengths + 1, "source_span": span}


def _longest(rows: list[list[int]]) -> int:
    return max(1, *map(len, rows))


class PairRows(Dataset):
    """Pairs of id rows; a batch is padded to its own longest row.

    Args:
        rows: (source ids, target ids of each reference) of each sample; targets run from start to end token.
        pad: Id of padding.
        causal: One row a pair; see ``pair_fields``.
        seed: Seed of what is drawn anew in each epoch.
        fresh: Whether the reference is drawn for each epoch; else it is the first.
    """

    epoch = 0

    def __init__(self, rows: Sequence[Any], pad: int, causal: bool, seed: int = 0, fresh: bool = False) -> None:
        self.rows, self.pad, self.causal, self.seed, self.fresh = rows, pad, causal, seed, fresh

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, i: int) -> int:
        """The random key of sample ``i``: a function of (seed, epoch, i), without the epoch unless ``fresh``."""
        return mix(self.seed, self.epoch if self.fresh else 0, i)

    def pair(self, i: int) -> tuple[list[int], list[int]]:
        """Source and target ids of sample ``i`` in this epoch."""
        source, targets = self.rows[i]
        return source, targets[self.key(i) % len(targets) if self.fresh else 0]

    def __getitem__(self, i: int) -> Batch:
        return {name: value[0] for name, value in self.__getitems__([i]).items()}

    def __getitems__(self, indices: list[int]) -> Batch:
        sources, targets = zip(*map(self.pair, indices))
        return pair_fields(list(sources), list(targets), self.pad, self.causal)

    def take(self, indices: Tensor) -> PairRows:
        """Some samples, in the order of ``indices``."""
        chosen = copy.copy(self)
        chosen.rows = [self.rows[i] for i in indices.tolist()]
        return chosen
