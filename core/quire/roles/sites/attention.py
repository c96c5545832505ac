"""What an attention layer attended to: pattern and values, caught where they are mixed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

PRODUCTS = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)
FUSED, PLAIN = "fused", "plain"


class Attended(TorchFunctionMode):
    """Keeps the latest attention: a fused call's arguments, or the product of weights and values where it is plain.

    The output projection that follows belongs to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.latest: tuple[Any, ...] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let everything pass."""
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            self.latest = (FUSED, *_bound(*args, **kwargs))
        elif func in PRODUCTS and len(args) == 2 and args[0].ndim == args[1].ndim and args[0].ndim > 2:
            self.latest = (PLAIN, *args)
        return func(*args, **kwargs)


def _bound(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Any, ...]:
    return query, key, value, attn_mask, is_causal, scale


def pattern(call: tuple[Any, ...], heads: int) -> Tensor:
    """[B,H,T,S] weights of one call, in fp32; rows sum to 1."""
    if call[0] == PLAIN:
        weights: Tensor = call[1] if call[1].ndim == 4 else call[1].unflatten(0, (-1, heads))
        return weights.float()
    _, query, key, _, mask, causal, scale = call
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.float() @ key.float().transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    return scores.softmax(-1)


def values(call: tuple[Any, ...], heads: int, kept: int) -> Tensor:
    """[B,S,H_kv,d_h]; values that were repeated for grouped queries are given once."""
    value: Tensor = call[2] if call[0] == PLAIN else call[3]
    value = value if value.ndim == 4 else value.unflatten(0, (-1, heads))
    return value[:, :: max(1, value.shape[1] // kept)].transpose(1, 2)
