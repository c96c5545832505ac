"""The data of single cells of a layout: take a batch's field apart along the grid, change cells, put it back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quire.contracts import Batch
from quire.roles.tokens.contract import Segment
from quire.testing.verdict import Skip


def apart(value: Tensor, segment: Segment) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A field as [B,N,…], one row a cell in the layout's order, and the way back.

    A one-dimensional grid lies along axis 1, any other along the last axes.
    """
    count = len(segment.grid)
    first = 1 if count == 1 else value.ndim - count
    sizes = tuple(value.shape[first : first + count])
    if sizes != tuple(g * p for g, p in zip(segment.grid, segment.patch)):
        raise Skip(f"{segment.field} of size {list(sizes)} is not cut into cells as it comes")
    split = value
    for i, (cells, size) in enumerate(zip(segment.grid, segment.patch)):
        split = split.unflatten(first + 2 * i, (cells, size))
    grid = [first + 2 * i for i in range(count)]
    order = [0, *grid, *(a for a in range(1, split.ndim) if a not in grid)]
    moved = split.permute(order)
    back = torch.argsort(torch.tensor(order)).tolist()

    def together(cells: Tensor) -> Tensor:
        return cells.reshape(moved.shape).permute(back).reshape(value.shape)

    return moved.flatten(1, count), together


def shuffled(batch: Batch, segment: Segment, order: Tensor) -> Batch:
    """The batch with the cells of one segment in another order, the same on every row."""
    cells, together = apart(batch[segment.field], segment)
    return {**batch, segment.field: together(cells[:, order])}


def changed(batch: Batch, segment: Segment, cell: int) -> Batch:
    """The batch with other data in one cell (counted within the segment)."""
    cells, together = apart(batch[segment.field], segment)
    cells = cells.clone()
    if cells.is_floating_point():
        cells[:, cell] = 1 - cells[:, cell]
    else:
        cells[:, cell] = (cells[:, cell] + 1) % (cells.max() + 1)
    return {**batch, segment.field: together(cells)}
