"""Energy differences from a score alone: a line integral along the straight path, by Gauss-Legendre rules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.polynomial import legendre
from torch import Tensor

from quire.errors import ConfigError

Score = Callable[[Tensor], Tensor]
"""States [N,…] → ∇log p of the same shape."""

Quadrature = Literal["scaled", "adaptive", "trapezoid", "first"] | int

FEWEST, MOST = 5, 64
TOLERANCE, DEEPEST = 1e-2, 12
ROWS = 1 << 15
"""States that the score is asked for at a time."""


def check_quadrature(value: Quadrature, asker: object) -> None:
    """Raise ``ConfigError`` when ``value`` is no rule."""
    names = ("scaled", "adaptive", "trapezoid", "first")
    if value in names or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST):
        return
    allowed = f"{', '.join(names)} or a number of points from 1 to {MOST}"
    raise ConfigError(f"{type(asker).__name__}.quadrature must be {allowed}, got {value!r}")


@functools.cache
def rule(points: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes in [0, 1], Gauss-Legendre weights, and the weights of a coarser rule on every second node, in double."""
    nodes, weights = legendre.leggauss(points)
    coarse, some = np.zeros(points), nodes[::2]
    moments = np.zeros(len(some))
    moments[0] = 1.0  # the mean of a Legendre polynomial is 0 but for the first
    coarse[::2] = np.linalg.solve(legendre.legvander(some, len(some) - 1).T, moments)
    return tuple(torch.from_numpy(a) for a in ((nodes + 1) / 2, weights / 2, coarse))  # type: ignore[return-value]


@functools.cache
def _rules() -> Tensor:
    """All rules up to 64 points in one table [3,65,64], so that a batch of rows picks theirs in one indexing."""
    table = torch.zeros(3, MOST + 1, MOST, dtype=torch.double)
    for points in range(1, MOST + 1):
        table[:, points, :points] = torch.stack(rule(points))
    return table


def energy_difference(
    score: Score, x: Tensor, y: Tensor, sigma: float, quadrature: Quadrature = "scaled"
) -> tuple[Tensor, Tensor]:
    """E(y) − E(x) = −∫₀¹ s(x + t(y − x))·(y − x) dt, row by row.

    A fixed number of points is not enough between modes: there the score turns within a few sigma, so the number has to
    grow with the distance over sigma. A score that is no gradient makes the result depend on the path; this is
    the straight one.

    Args:
        score: The score.
        x: Where the paths begin, [B,…].
        y: Where they end, [B,…].
        sigma: The scale on which the score may turn.
        quadrature: ``"scaled"``: ⌈4‖y − x‖/σ⌉ points, 5 to 64, for each row; ``"adaptive"``: halve pieces until two
            estimates differ by less than 0.01; a number of points; ``"trapezoid"``; ``"first"``: s(x)·(y − x), which
            is biased and a control only.

    Returns:
        The differences [B], and an estimate of their errors [B] (NaN for rules that give none), both in double.
    """
    if quadrature in ("first", "trapezoid"):
        slope = _along(score, x, y - x)
        if quadrature == "trapezoid":
            slope = (slope + _along(score, y, y - x)) / 2
        return -slope, torch.full_like(slope, float("nan"))
    if quadrature == "adaptive":
        return _adaptive(score, x, y, sigma)
    if quadrature == "scaled":
        distance = (y - x).flatten(1).double().norm(dim=1)
        points = (4 * distance / sigma).nan_to_num(0, MOST, 0).ceil().clamp(FEWEST, MOST).long()
    else:
        points = torch.full((len(x),), int(quadrature), device=x.device)
    return _fixed(score, x, y, points)


def _fixed(score: Score, x: Tensor, y: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """One rule a row: all rows' nodes behind each other in one call of the score."""
    row = torch.repeat_interleave(torch.arange(len(x), device=x.device), points)
    place = torch.arange(len(row), device=x.device) - (points.cumsum(0) - points)[row]
    time, fine, coarse = _rules().to(x.device)[:, points[row], place]
    slope = _along(score, _between(x[row], y[row], time), (y - x)[row])
    whole = torch.zeros(2, len(x), dtype=torch.double, device=x.device)
    whole.index_add_(1, row, torch.stack([fine * slope, coarse * slope]))
    error = (whole[0] - whole[1]).abs()
    return -whole[0], torch.where(points > 1, error, torch.full_like(error, float("nan")))


def _adaptive(score: Score, x: Tensor, y: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Halve every piece whose two estimates differ, until each row's differences sum to less than the tolerance.

    Pieces are at most 2.5σ long at first: on long ones two poor estimates may agree, both blind to what lies between.
    """
    distance = (y - x).flatten(1).double().norm(dim=1)
    pieces = (distance / (2.5 * sigma)).nan_to_num(0, MOST, 0).ceil().clamp(1, MOST).long()
    row = torch.repeat_interleave(torch.arange(len(x), device=x.device), pieces)
    place = torch.arange(len(row), device=x.device) - (pieces.cumsum(0) - pieces)[row]
    width = 1 / pieces[row].double()
    start = place * width
    whole = _piece(score, x, y, row, start, width)
    total, error = torch.zeros_like(distance), torch.zeros_like(distance)
    for depth in range(DEEPEST):
        half = width / 2
        left, right = _piece(score, x, y, row, start, half), _piece(score, x, y, row, start + half, half)
        apart = (left + right - whole).abs()
        done = ~(apart >= TOLERANCE * width) | (depth == DEEPEST - 1)  # what is not finite is not halved
        total.index_add_(0, row[done], (left + right)[done])
        error.index_add_(0, row[done], apart[done])
        going = ~done
        if not bool(going.any()):
            break
        row, width = row[going].repeat(2), half[going].repeat(2)
        start = torch.cat([start[going], (start + half)[going]])
        whole = torch.cat([left[going], right[going]])
    return -total, error


def _piece(score: Score, x: Tensor, y: Tensor, row: Tensor, start: Tensor, width: Tensor) -> Tensor:
    nodes, weights, _ = rule(FEWEST)
    time = (start[:, None] + width[:, None] * nodes.to(x.device)).flatten()
    each = row.repeat_interleave(FEWEST)
    slope = _along(score, _between(x[each], y[each], time), (y - x)[each])
    return width * (slope.view(-1, FEWEST) @ weights.to(x.device))


def _between(x: Tensor, y: Tensor, time: Tensor) -> Tensor:
    return x + time.to(x.dtype).view(-1, *[1] * (x.ndim - 1)) * (y - x)


def _along(score: Score, at: Tensor, direction: Tensor) -> Tensor:
    """s(at)·direction, [N] in double."""
    slopes = [(score(a).double() * d.double()).flatten(1).sum(1) for a, d in zip(at.split(ROWS), direction.split(ROWS))]
    return torch.cat(slopes)
