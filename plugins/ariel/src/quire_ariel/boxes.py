"""Boxes of the cube in float64: how a token narrows an axis, which token a point lies in. Celotti et al. 2020."""

from __future__ import annotations

import torch
from torch import Tensor


def narrow(low: Tensor, high: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """The part [start, end) of the interval [low, high), elementwise; ``start`` and ``end`` are in [0, 1].

    Encoding and decoding both come here, so that they round alike. The end is held inside: ``low + (high - low)`` may
    round above ``high``.
    """
    width = high - low
    return torch.minimum(low + width * start, high), torch.minimum(low + width * end, high)


def token_at(low: Tensor, high: Tensor, point: Tensor, table: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """The token [N] whose half-open part of [low, high) holds ``point`` [N], what comes before it, and its frequency.

    A point at the very end belongs to the last token with a frequency above 0.

    Args:
        low: [N].
        high: [N].
        point: [N].
        table: [N,V] int64 frequencies, which sum to ``total``.
        total: 2^bits.
    """
    ends = table.cumsum(1)
    place = ((point - low) / (high - low) * total).nan_to_num(0.0).clamp(0, total - 1).long()
    token = torch.searchsorted(ends, place[:, None], right=True)
    count = table.gather(1, token)
    start = ends.gather(1, token) - count
    a, b = narrow(low[:, None], high[:, None], *shares(start, count, total))
    if bool(((point[:, None] < a) | (point[:, None] >= b)).any()):  # the division has rounded across a border
        token = _searched(low, high, point, ends, table, total)
        count = table.gather(1, token)
        start = ends.gather(1, token) - count
    return token[:, 0], start[:, 0], count[:, 0]


def _searched(low: Tensor, high: Tensor, point: Tensor, ends: Tensor, table: Tensor, total: int) -> Tensor:
    low, high, point = low[:, None], high[:, None], point[:, None]
    borders = torch.minimum(low + (high - low) * (ends.double() / total), high)
    places = torch.arange(table.shape[1], device=table.device)
    last = places.where(table > 0, places.new_tensor(-1)).amax(1, keepdim=True)
    token = torch.minimum(torch.searchsorted(borders, point, right=True), last)
    while bool((empty := table.gather(1, token) == 0).any()):  # below every border of a box that is empty
        token = token + empty.long()
    return token


def shares(start: Tensor, count: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Where a token's part begins and ends, as float64 without rounding."""
    return start.double() / total, (start + count).double() / total


def middle(low: Tensor, high: Tensor) -> Tensor:
    """The mid-point, held below ``high``: in a box of one step the half rounds up."""
    return torch.minimum((low + high) / 2, torch.nextafter(high, low)).maximum(low)


def axis_bits(bits: Tensor, dims: int) -> Tensor:
    """Bits [B,T] of a sentence's tokens → [B,dims], bits on each axis; token t is on axis t mod dims."""
    short = -bits.shape[1] % dims
    return torch.nn.functional.pad(bits, (0, short)).unflatten(1, (-1, dims)).sum(1)


def dims_for(bits: Tensor, capacity: float) -> int:
    """The least number of axes on which a sentence's bits [T] fit; each token alone must."""
    return next((d for d in range(1, len(bits)) if float(axis_bits(bits[None], d).max()) <= capacity), len(bits))
