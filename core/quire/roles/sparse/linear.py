"""Linear maps over active latents only: no tensor of [N,K,D] or [N,F] is kept, and gradients equal the dense path's.

A row of the decoder's gradient is a weighted sum of the tokens on which its latent is active. So the N*K kept pairs
are sorted by latent once, and each sum is a bag: ``embedding_bag`` over the upstream gradient for the decoder's rows,
over the inputs for the encoder's. Sorting is stable and a bag adds in order, so the result does not depend on threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

DENSE_FROM = 8
"""Rows of more than F / 8 kept latents take the dense path, which is then faster."""


class ByLatent:
    """The kept pairs of ``indices`` [N,K] sorted by latent, made when first asked for and then shared."""

    def __init__(self, indices: Tensor, latents: int) -> None:
        self.indices, self.latents = indices, latents
        self._sorted: tuple[Tensor, Tensor, Tensor] | None = None

    def sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        """(order of the flat pairs, their tokens, where each latent begins)."""
        if self._sorted is None:
            flat = self.indices.flatten()
            ordered, order = flat.sort(stable=True)
            start = torch.searchsorted(ordered, torch.arange(self.latents, device=flat.device))
            self._sorted = order, order // self.indices.shape[1], start
        return self._sorted

    def bag(self, table: Tensor, weights: Tensor) -> Tensor:
        """[F,D]: for each latent the sum of ``table``'s rows at its tokens, times ``weights`` [N,K]."""
        order, tokens, start = self.sorted()
        weights = weights.flatten()[order].to(table.dtype)
        return embedding_bag(tokens, table.contiguous(), start, per_sample_weights=weights, mode="sum")

    def total(self, weights: Tensor) -> Tensor:
        """[F]: for each latent the sum of ``weights`` [N,K]."""
        order, _, start = self.sorted()
        lengths = torch.diff(start, append=start.new_tensor([len(order)]))
        return torch.segment_reduce(weights.flatten()[order], "sum", lengths=lengths)


class _Kept(torch.autograd.Function):
    """The values of latents that were chosen, with the gradient of relu((x - b_dec) W_enc' + b_enc) at them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, before: Tensor | None, rows: Tensor, bias: Tensor | None, values: Tensor, plan: ByLatent
    ) -> Tensor:
        ctx.save_for_backward(x, before, rows, values)
        ctx.plan = plan
        return values.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, before, rows, values = ctx.saved_tensors
        plan: ByLatent = ctx.plan
        needs_x, needs_before, needs_rows, needs_bias = ctx.needs_input_grad[:4]
        gradient = upstream * (values > 0)  # relu
        sums = plan.total(gradient) if needs_bias or needs_before or (needs_rows and before is not None) else None
        d_x = d_before = d_rows = d_bias = None
        if needs_rows:
            inside = x if before is None else x - before
            d_rows = plan.bag(inside.to(rows.dtype), gradient)
        if needs_bias:
            d_bias = sums
        if needs_before:  # the sum over tokens of -dx, without dx
            d_before = -(sums.to(rows.dtype) @ rows)  # type: ignore[union-attr]
        if needs_x:
            d_x = embedding_bag(plan.indices, rows, per_sample_weights=gradient.to(rows.dtype), mode="sum")
        return d_x, d_before, d_rows, d_bias, None, None


class _Rows(torch.autograd.Function):
    """Passes ``out`` through; its gradient also gives the decoder's rows theirs."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, rows: Tensor, values: Tensor, plan: ByLatent) -> Tensor:
        ctx.save_for_backward(values)
        ctx.plan = plan
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (values,) = ctx.saved_tensors
        d_rows = ctx.plan.bag(upstream, values) if ctx.needs_input_grad[1] else None
        return upstream, d_rows, None, None


def kept_values(
    x: Tensor, before: Tensor | None, rows: Tensor, bias: Tensor | None, values: Tensor, plan: ByLatent
) -> Tensor:
    """Values [N,K] of chosen latents, attached to the graph of the encoder that they came from.

    Args:
        x: [N,D] input.
        before: [D] subtracted from the input first, or None.
        rows: [F,D] encoder.
        bias: [F] or None.
        values: [N,K] relu((x - before) rows' + bias) at ``plan.indices``, computed without a graph.
        plan: The chosen indices.

    Returns:
        ``values``, whose gradient reaches x, before, rows and bias.
    """
    made: Tensor = _Kept.apply(x, before, rows, bias, values, plan)
    return made


def weighted_rows(values: Tensor, rows: Tensor, plan: ByLatent) -> Tensor:
    """[N,D]: for each token the sum of ``rows`` [F,D] at ``plan.indices``, times ``values`` [N,K]."""
    values = values.to(rows.dtype)
    out = embedding_bag(plan.indices, rows.detach(), per_sample_weights=values, mode="sum")
    made: Tensor = _Rows.apply(out, rows, values.detach(), plan)
    return made
