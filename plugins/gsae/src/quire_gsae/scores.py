"""What a latent matters for the loss, and the scores that latents are kept by: the arithmetic of Olmo et al. 2024.

z, a and s are [N,F], one row a token and one column a latent; g = dL/dx~ is [N,D], d the decoder's rows [F,D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.roles.sparse.ranks import sum_over_ranks

NORMS = ("batch_mean", "rms", "none")
SCORES = ("additive", "attribution")
LEAST = 1e-30
"""Stands for no effect at all in ``attribution``, so that z still orders such latents and 0 stays last."""


@torch.no_grad()
def effect(grad: Tensor, rows: Tensor) -> Tensor:
    """a = |g d'| [N,F]: what one unit of each latent changes the loss by, to first order; float32 at least.

    Args:
        grad: [N,D].
        rows: [F,D].
    """
    wide = torch.promote_types(torch.promote_types(grad.dtype, rows.dtype), torch.float32)
    with torch.autocast(grad.device.type, enabled=False):
        return (grad.to(wide) @ rows.to(wide).T).abs_()


@torch.no_grad()
def size(a: Tensor, norm: str, counts: Tensor | None = None, over_ranks: bool = False) -> Tensor:
    """The scalar that ``a`` is divided by, so that beta does not depend on how gradients are scaled.

    Args:
        a: [N,F].
        norm: ``batch_mean``, ``rms`` or ``none`` (then 1).
        counts: [N] bool, tokens that count; where none does, all do.
        over_ranks: Take the tokens of all processes; every process must then call it.
    """
    if norm == "none":
        return a.new_ones(())
    each = a.mean(1) if norm == "batch_mean" else a.square().mean(1)
    full = torch.ones_like(each)
    chosen = full if counts is None else counts.to(each.dtype)
    sums = torch.stack([(each * chosen).sum(), chosen.sum(), each.sum(), full.sum()])
    if over_ranks:
        sums = sum_over_ranks(sums)
    mean = torch.where(sums[1] > 0, sums[0] / sums[1].clamp(min=1), sums[2] / sums[3].clamp(min=1))
    return mean if norm == "batch_mean" else mean.sqrt()


@torch.no_grad()
def scores(z: Tensor, a: Tensor, divisor: Tensor, beta: float, score: str) -> Tensor:
    """s [N,F]: ``z (1 + beta a)``, or ``z a`` for ``attribution``, with a over ``divisor``.

    A divisor of 0 means that no latent has an effect: s orders as z does. So does a row whose gradient is 0.
    """
    scaled = a * torch.where(divisor > 0, 1 / divisor, 0.0)
    if score == "attribution":
        return z * scaled.clamp_(min=LEAST)
    return z * (1 + beta * scaled)
