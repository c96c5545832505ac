"""Subsets of tokens: the kept cells, the rest, and the way back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.errors import ConfigError, DataError


def gather(values: Tensor, index: Tensor) -> Tensor:
    """``values[b, index[b, k]]`` for all b, k: [B,T,…] and [B,K] → [B,K,…]."""
    if values.ndim == 2:
        return values.gather(1, index)
    shape = (*index.shape, *values.shape[2:])
    return values.gather(1, index.reshape(*index.shape, *[1] * (values.ndim - 2)).expand(shape))


@dataclass
class Subset:
    """K of N cells on every row, the others, and the way back.

    Args:
        keep: [B,K] int64, ascending unless the maker was asked otherwise.
        rest: [B,N-K] int64, ascending.
        restore: [B,N] int64: where each cell went, so ``restore`` undoes ``shuffle``.
    """

    keep: Tensor
    rest: Tensor
    restore: Tensor

    @classmethod
    def of(cls, keep: Tensor, cells: int, check: bool = True) -> Subset:
        """The subset that keeps ``keep`` of ``cells`` cells. ``check=False`` trusts it and never waits for a GPU.

        Raises:
            ConfigError: an index outside the layout, or twice in a row.
        """
        if check:
            check_index(keep, cells)
        left = torch.ones(len(keep), cells, dtype=torch.bool, device=keep.device).scatter_(1, keep, False)
        rest = torch.argsort(left, dim=1, descending=True, stable=True)[:, : cells - keep.shape[1]]
        return cls.split(keep, rest)

    @classmethod
    def split(cls, keep: Tensor, rest: Tensor) -> Subset:
        """From both halves of a permutation, unchecked."""
        order = torch.cat([keep, rest], 1)
        places = torch.arange(order.shape[1], device=order.device).expand_as(order)
        return cls(keep, rest, torch.empty_like(order).scatter_(1, order, places))

    @classmethod
    def ordered(cls, order: Tensor, count: int) -> Subset:
        """The first ``count`` of each row of a permutation [B,N], both halves sorted."""
        return cls.split(order[:, :count].sort(1).values, order[:, count:].sort(1).values)

    @property
    def cells(self) -> int:
        """N."""
        return self.restore.shape[1]

    def kept(self) -> Tensor:
        """[B,N] bool, True where a cell is kept."""
        return self.restore < self.keep.shape[1]

    def shuffle(self, values: Tensor) -> Tensor:
        """[B,N,…] in cell order → kept cells first, then the rest."""
        return gather(values, torch.cat([self.keep, self.rest], 1))

    def unshuffle(self, values: Tensor) -> Tensor:
        """Kept cells then the rest, [B,N,…] → cell order. Undoes ``shuffle``."""
        return gather(values, self.restore)


def check_index(keep: Tensor, cells: int, name: str = "keep") -> None:
    """Refuse indices outside 0..cells-1 or twice in a row. Waits for the GPU when ``keep`` is there.

    Raises:
        ConfigError: with the index or the row.
    """
    if keep.ndim != 2 or keep.dtype != torch.long:
        raise ConfigError(
            f"{name} must be [B,K] int64, got {list(keep.shape)} {str(keep.dtype).removeprefix('torch.')}"
        )
    if not keep.numel():
        raise ConfigError(f"{name} is empty; at least 1 token is needed")
    low, high = int(keep.min()), int(keep.max())
    if low < 0 or high >= cells:
        raise ConfigError(f"{name} has index {low if low < 0 else high} but the layout has {cells} cells")
    ordered = keep.sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(1)
    if bool(twice.any()):
        raise ConfigError(f"{name} repeats an index in row {int(twice.nonzero()[0])}")


def equal_counts(kept: Tensor) -> Tensor:
    """A bool mask [B,N] of kept cells → their indices [B,K], ascending.

    Raises:
        ConfigError: rows that keep different numbers.
    """
    counts = kept.sum(1)
    low, high = int(counts.min()), int(counts.max())
    if low != high:
        raise ConfigError(f"rows keep {low}..{high} tokens; equal counts are needed")
    return kept.nonzero()[:, 1].reshape(len(kept), low)


def indices(chosen: Subset | Tensor, cells: int, name: str = "keep") -> Tensor:
    """The kept indices: of a Subset as they are, of a bare tensor checked."""
    if isinstance(chosen, Subset):
        if chosen.cells != cells:
            raise ConfigError(f"{name} was drawn for {chosen.cells} cells but there are {cells} tokens")
        return chosen.keep
    if not torch.compiler.is_compiling():
        check_index(chosen, cells, name)
    return chosen


def check_real(mask: Tensor, what: str = "tokens") -> None:
    """Refuse samples of padding only.

    Raises:
        DataError: with the first such sample.
    """
    empty = ~mask.any(1)
    if bool(empty.any()):
        raise DataError(f"sample {int(empty.nonzero()[0])} has no real {what}")
