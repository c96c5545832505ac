"""Attention on timm's pre-norm blocks: all tokens, a kept subset, or a context of keys and values."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quire.errors import ConfigError
from quire.roles.tokens.contract import Subset, Tokens, gather, indices
from quire.roles.tokens.positions import rotate

Rotation = tuple[Tensor, Tensor]


def attend(
    attn: Any,
    queries: Tensor,
    source: Tensor,
    mask: Tensor | None = None,
    turn_q: Rotation | None = None,
    turn_k: Rotation | None = None,
) -> Tensor:
    """timm's attention with queries from one place and keys and values from another.

    ``attn.qkv`` is cut before projecting, so keys and values cost what ``source`` is long.

    Args:
        attn: A timm ``Attention``.
        queries: [B,N,D], normalised.
        source: [B,M,D], normalised; ``queries`` itself for self-attention.
        mask: [B,M] bool, True = real key; None when all are.
        turn_q: Rotary angles of the queries.
        turn_k: Rotary angles of the keys.

    Returns:
        [B,N,D].
    """
    size, heads = attn.qkv.weight.shape[0] // 3, attn.num_heads
    weight, bias = attn.qkv.weight, attn.qkv.bias
    if source is queries:
        q, k, v = F.linear(queries, weight, bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    else:
        q = F.linear(queries, weight[:size], None if bias is None else bias[:size]).unflatten(-1, (heads, -1))
        q = q.transpose(1, 2)
        kv = F.linear(source, weight[size:], None if bias is None else bias[size:])
        k, v = kv.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if turn_q is not None and turn_k is not None:
        q, k = rotate(q, turn_q), rotate(k, turn_k)
    drop = attn.attn_drop.p if attn.training else 0.0
    keys = None if mask is None else mask[:, None, None, :]
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=keys, dropout_p=drop)
    x = attn.norm(x.transpose(1, 2).flatten(2)) if hasattr(attn, "norm") else x.transpose(1, 2).flatten(2)
    if getattr(attn, "gate", None) is not None:
        x = x * attn.gate(queries).sigmoid()
    return attn.proj_drop(attn.proj(x))


def run(
    blocks: Any,
    x: Tensor,
    context: Tensor | None = None,
    context_update: bool = True,
    mask: Tensor | None = None,
    rotation: Rotation | None = None,
) -> Tensor:
    """Blocks one after the other.

    Args:
        blocks: timm pre-norm ``Block``s.
        x: [B,S,D], prefix tokens included.
        context: [B,M] rows of ``x`` that are keys and values in every block; None for all.
        context_update: False takes keys and values of all blocks from the first block's input.
        mask: [B,S] bool, True = real; None without padding.
        rotation: Rotary angles of the rows of ``x``.

    Returns:
        [B,S,D].
    """
    if context is None and mask is None and rotation is None:
        for block in blocks:
            x = block(x)
        return x
    keys, turn = mask, rotation
    if context is not None:
        keys = None if mask is None else mask.gather(1, context)
        turn = None if rotation is None else tuple(_turned(r, context) for r in rotation)  # type: ignore[assignment]
    frozen = None if context is None or context_update else gather(x, context)
    for block in blocks:
        z = block.norm1(x)
        source = z
        if context is not None:
            source = gather(z, context) if frozen is None else block.norm1(frozen)
        x = x + block.drop_path1(block.ls1(attend(block.attn, z, source, keys, rotation, turn)))
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return x


def _turned(angles: Tensor, context: Tensor) -> Tensor:
    index = context[:, None, :, None].expand(-1, -1, -1, angles.shape[-1])
    return angles.expand(len(context), -1, -1, -1).gather(2, index)


def run_tokens(
    blocks: Any,
    norm: Any,
    tokens: Tokens,
    context: Subset | Tensor | None = None,
    context_update: bool = True,
    rotation: Rotation | None = None,
) -> Tokens:
    """``run`` and the final norm on Tokens; prefix tokens are always real and always in the context."""
    count, prefix = tokens.values.shape[1], tokens.prefix.shape[1]
    x = tokens.joined()
    chosen = None
    if context is not None:
        chosen = indices(context, count, "context")
        if prefix:
            first = torch.arange(prefix, device=x.device).expand(len(x), prefix)
            chosen = torch.cat([first, chosen + prefix], 1)
    mask = F.pad(tokens.mask, (prefix, 0), value=True) if tokens.padded else None
    x = norm(run(blocks, x, chosen, context_update, mask, rotation))
    return tokens.with_values(x[:, prefix:], x[:, :prefix])


class KeylessBias(nn.Module):
    """A fused query, key, value projection with biases on queries and values only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * width, width))
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))

    @property
    def bias(self) -> Tensor:
        """[3D], zeros in the keys' part."""
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def forward(self, x: Tensor) -> Tensor:
        """[…,D] → […,3D]."""
        return F.linear(x, self.weight, self.bias)


def make_blocks(
    width: int,
    depth: int,
    heads: int,
    mlp_ratio: float = 4.0,
    key_bias: bool = True,
    layer_scale: float | None = None,
    drop_path: float = 0.0,
    start: str = "xavier",
) -> nn.ModuleList:
    """timm blocks whose matrices start by ``start_weights``, biases at 0.

    Raises:
        ConfigError: heads that don't divide the width.
    """
    from timm.models.vision_transformer import Block

    if heads < 1 or width % heads:
        raise ConfigError(f"width={width} is not divisible by heads={heads}")
    blocks: Any = nn.ModuleList()
    for i in range(depth):
        block: Any = Block(
            width,
            heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=True,
            init_values=layer_scale,
            drop_path=drop_path * i / max(1, depth - 1),
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),  # type: ignore[arg-type]
        )
        if not key_bias:
            block.attn.qkv = KeylessBias(width)
        start_weights(block, start)
        blocks.append(block)
    return blocks


def start_weights(module: nn.Module, start: str) -> None:
    """Draw the start of every linear map in ``module``; biases at 0.

    Args:
        module: Anything that holds linear maps.
        start: ``normal``, truncated and of deviation 0.02 (DeiT, BERT), or ``xavier``, uniform by each matrix's size
            (MAE), where q, k and v are three matrices.
    """
    for name, part in module.named_modules():
        if not isinstance(part, nn.Linear | KeylessBias):
            continue
        if start == "normal":
            nn.init.trunc_normal_(part.weight, std=0.02)
        else:
            for matrix in part.weight.chunk(3) if name.endswith("qkv") else [part.weight]:
                nn.init.xavier_uniform_(matrix)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


def xavier(linear: nn.Linear) -> nn.Linear:
    """Start a linear map Xavier-uniform with zero bias."""
    nn.init.xavier_uniform_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear
