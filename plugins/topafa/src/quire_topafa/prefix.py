"""How many latents of an order bring the code's norm nearest to the input's: the selection rule of Lee et al. 2025.

C_j is the norm of the first j latents' contributions; it never falls with j. A token keeps the first j that brings C_j
nearest to its norm n; on a tie the smaller one.
"""

from __future__ import annotations

import torch
from torch import Tensor

DOMAINS = ("norm", "squared")
FIRST = 256
"""Latents that are ordered at first; tokens whose norm they don't reach get twice as many, and so on."""
OFFICIAL_SENTINEL = 1e8
"""What the official code puts at the end of the squared sums, in place of infinity."""


@torch.no_grad()
def nearest(squares: Tensor, target: Tensor, domain: str, last: float | None = None) -> Tensor:
    """[N] the number of latents to keep, 1 and up.

    Args:
        squares: [N,m] squared contributions in the order of keeping.
        target: [N] norms to come near to.
        domain: ``norm`` compares C_j with n, ``squared`` their squares; the two can differ.
        last: What stands for the last squared sum; None leaves it, as for a part of an order.
    """
    sums = squares.cumsum(1)
    if last is not None and squares.shape[1] > 1:
        sums[:, -1] = last
    gaps = (sums.sqrt() - target[:, None]) if domain == "norm" else (sums - target.square()[:, None])
    return gaps.abs_().argmin(1) + 1


@torch.no_grad()
def prefixes(
    scores: Tensor,
    squares: Tensor,
    target: Tensor,
    domain: str = "norm",
    most: int | None = None,
    last: float = torch.inf,
    first: int = FIRST,
) -> tuple[Tensor, Tensor]:
    """The kept latents of each token: (indices [N,K], how many of them count [N]); K is the largest count.

    Only as much of the order is made as a token needs, which is exact: once C_m is at or beyond n, what follows is no
    nearer.

    Args:
        scores: [N,F], the higher the sooner kept.
        squares: [N,F] squared contributions to the norm, float32 at least.
        target: [N].
        domain: See ``nearest``.
        most: Most latents of a token.
        last: What stands for the squared sum over all latents.
        first: Latents that are ordered at first.
    """
    count, latents = squares.shape
    left = torch.arange(count, device=squares.device)
    counts = torch.ones(count, dtype=torch.long, device=squares.device)
    found: list[tuple[Tensor, Tensor]] = []
    m = min(first, latents)
    while len(left):
        order = scores[left].topk(m, 1, sorted=True).indices
        ordered, wanted = squares[left].gather(1, order), target[left]
        whole = m == latents
        here = nearest(ordered, wanted, domain, last if whole else None)
        enough = torch.ones_like(wanted, dtype=torch.bool)
        if not whole and (most is None or m < most):
            enough = ordered.sum(1).sqrt() > wanted * (1 + 1e-4)  # clear of how sums round
        counts[left[enough]] = here[enough]
        found.append((left[enough], order[enough]))
        left, m = left[~enough], min(2 * m, latents)
    if most is not None:
        counts = counts.clamp(max=most)
    longest = int(counts.max())
    indices = torch.zeros(count, longest, dtype=torch.long, device=squares.device)
    for tokens, order in found:
        some = order[:, :longest]
        indices[tokens, : some.shape[1]] = some
    return indices, counts
