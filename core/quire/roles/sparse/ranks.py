"""Sums over all processes of a run; on one process, the value itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import all_gather, all_reduce, get_world_size, is_available, is_initialized


def ranks() -> int:
    """Number of processes that train together."""
    return get_world_size() if is_available() and is_initialized() else 1


@torch.no_grad()
def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of ``value`` over all processes, without a gradient. Every process must call it."""
    if ranks() == 1:
        return value.detach()
    total = value.detach().clone().contiguous()
    all_reduce(total)
    return total


@torch.no_grad()
def rows_of_all_ranks(rows: Tensor) -> Tensor:
    """All processes' ``rows`` [N,...] behind each other; each must have as many."""
    if ranks() == 1:
        return rows.detach()
    rows = rows.detach().contiguous()
    gathered = [torch.empty_like(rows) for _ in range(ranks())]
    all_gather(gathered, rows)
    return torch.cat(gathered)
