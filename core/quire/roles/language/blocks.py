"""Transformer blocks over a cache whose rows may hold different numbers of tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu


class Cache:
    """Keys and values of one layer: [B,H,S,Dh], row b's token s in slot s. Doubled when full.

    The first write makes the slots, so a layer that never runs holds none.
    """

    def __init__(self, batch: int, heads: int, slots: int, width: int, like: Tensor) -> None:
        self.keys = like.new_zeros(batch, heads, 0, width)
        self.values = like.new_zeros(batch, heads, 0, width)
        self.room = slots

    def grow(self, slots: int) -> None:
        """Make room for ``slots`` slots."""
        have = self.keys.shape[2]
        self.room = max(self.room, slots)
        if slots > have > 0:
            more = max(slots, 2 * have) - have
            for name in ("keys", "values"):
                old = getattr(self, name)
                setattr(self, name, torch.cat([old, old.new_zeros(*old.shape[:2], more, old.shape[3])], 2))

    def write(self, keys: Tensor, values: Tensor, where: int | Tensor) -> None:
        """Put Q new slots [B,H,Q,Dh] from one common slot on, or at slots [B,Q]."""
        if not self.keys.shape[2]:
            batch, heads, _, width = self.keys.shape
            self.keys = self.keys.new_zeros(batch, heads, self.room, width)
            self.values = self.values.new_zeros(batch, heads, self.room, width)
        if isinstance(where, int):
            self.keys[:, :, where : where + keys.shape[2]] = keys
            self.values[:, :, where : where + keys.shape[2]] = values
        else:
            row = torch.arange(len(where), device=where.device)[:, None]
            self.keys[row, :, where] = keys.transpose(1, 2)
            self.values[row, :, where] = values.transpose(1, 2)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots ``source`` [B,Q] to ``target`` [B,Q], row by row."""
        if not self.keys.shape[2]:
            return
        row = torch.arange(len(source), device=source.device)[:, None]
        self.keys[row, :, target] = self.keys[row, :, source]
        self.values[row, :, target] = self.values[row, :, source]

    def rows(self, order: Tensor) -> None:
        """Select rows."""
        self.keys, self.values = self.keys[order], self.values[order]

    @property
    def bytes(self) -> int:
        """Memory held."""
        return 2 * self.keys.numel() * self.keys.element_size()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on [B,H,T,Dh]; ``cos`` and ``sin`` are [B or 1,1,T,Dh/2]."""
    a, b = x.chunk(2, -1)
    return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(a * sin, b, cos)], -1)


def dropout_of(rate: float) -> nn.Module:
    """Dropout, or nothing at all at rate 0: a call that does nothing costs as much as a small kernel."""
    return nn.Dropout(rate) if rate else nn.Identity()


def norm_of(kind: str, width: int) -> nn.Module:
    """``layer`` or ``rms`` norm."""
    return nn.LayerNorm(width) if kind == "layer" else nn.RMSNorm(width, eps=1e-6)


class Attention(nn.Module):
    """Self- or cross-attention with a fused kernel.

    Args:
        width: D.
        heads: H; D/H is the head width.
        qk_norm: Normalise queries and keys per head.
        dropout: Of the attention weights, while training.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.query_norm: nn.Module = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.key_norm: nn.Module = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()

    def split(self, x: Tensor) -> Tensor:
        """[B,T,D] → [B,H,T,Dh]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def queries(self, x: Tensor) -> Tensor:
        """[B,T,D] → [B,H,T,Dh], normalised."""
        return self.query_norm(self.split(self.query(x)))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B,S,D] → keys and values [B,H,S,Dh]."""
        keys, values = self.key_value(x).chunk(2, -1)
        return self.key_norm(self.split(keys)), self.split(values)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        """Attend and project: [B,T,D]. ``mask`` is bool, True = seen, broadcast to [B,H,T,S]."""
        rate = self.dropout if self.training else 0.0
        mixed = scaled_dot_product_attention(q, k, v, mask, dropout_p=rate, is_causal=causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """GELU or SwiGLU feed-forward; SwiGLU's hidden width is given as it is."""

    def __init__(self, width: int, hidden: int, kind: str, dropout: float) -> None:
        super().__init__()
        self.kind = kind
        self.up = nn.Linear(width, hidden if kind == "gelu" else 2 * hidden)
        self.down = nn.Linear(hidden, width)
        self.drop = dropout_of(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[…,D] → […,D]."""
        x = self.up(x)
        if self.kind == "gelu":
            return self.down(self.drop(gelu(x)))
        gate, value = x.chunk(2, -1)
        return self.down(self.drop(silu(gate) * value))


class Block(nn.Module):
    """Pre-norm self-attention, cross-attention where there is a source, feed-forward."""

    def __init__(
        self, width: int, heads: int, hidden: int, norm: str, mlp: str, qk_norm: bool, dropout: float, cross: bool
    ) -> None:
        super().__init__()
        self.norm_self, self.attention = norm_of(norm, width), Attention(width, heads, qk_norm, dropout)
        self.norm_cross = norm_of(norm, width) if cross else None
        self.cross = Attention(width, heads, qk_norm, dropout) if cross else None
        self.norm_mlp = norm_of(norm, width) if mlp != "none" else None
        self.mlp = MLP(width, hidden, mlp, dropout) if mlp != "none" else None
        self.drop = dropout_of(dropout)

    def forward(self, x: Tensor, seen: Seen, source: Source | None = None, cache: Cache | None = None) -> Tensor:
        """One layer on [B,T,D]; with a cache, T new slots behind those it holds."""
        z = self.norm_self(x)
        q = self.attention.queries(z)
        k, v = self.attention.keys_values(z)
        if seen.cos is not None and seen.sin is not None:
            q, k = rotate(q, seen.cos, seen.sin), rotate(k, seen.cos, seen.sin)
        if cache is not None:
            cache.write(k, v, seen.where)
            if seen.slots > k.shape[2] or not seen.causal:
                k, v = cache.keys[:, :, : seen.slots], cache.values[:, :, : seen.slots]
        x = x + self.drop(self.attention.mix(q, k, v, seen.mask, seen.causal))
        if self.cross is not None and self.norm_cross is not None and source is not None:
            ck, cv = source.keys_values(self)
            x = x + self.drop(self.cross.mix(self.cross.queries(self.norm_cross(x)), ck, cv, source.mask))
        if self.mlp is not None and self.norm_mlp is not None:
            x = x + self.drop(self.mlp(self.norm_mlp(x)))
        return x


class Seen:
    """What the new slots of one pass see, shared by all layers.

    Attributes:
        mask: [B or 1,1,T,S] bool, or None.
        causal: Plain causal attention among the new slots alone, no mask needed.
        where: First slot to write, or [B,Q] slots.
        slots: S, slots read from the cache.
        cos, sin: Rotary tables at the new slots' positions.
    """

    def __init__(
        self,
        mask: Tensor | None,
        causal: bool,
        where: int | Tensor,
        slots: int,
        cos: Tensor | None,
        sin: Tensor | None,
    ) -> None:
        self.mask, self.causal, self.where, self.slots, self.cos, self.sin = mask, causal, where, slots, cos, sin


class Source:
    """The encoder's codes; each layer's keys and values are made once and never touched again.

    Args:
        values: [B,S,D].
        mask: [B,S] bool, True = real, or None.
    """

    def __init__(self, values: Tensor, mask: Tensor | None) -> None:
        self.values = values
        self.mask = None if mask is None else mask[:, None, None, :]
        self.made: dict[int, tuple[Tensor, Tensor]] = {}

    def keys_values(self, block: Block) -> tuple[Tensor, Tensor]:
        """The layer's cross-attention keys and values; kept in evaluation."""
        assert block.cross is not None
        if block.training:
            return block.cross.keys_values(self.values)
        if id(block) not in self.made:
            self.made[id(block)] = block.cross.keys_values(self.values)
        return self.made[id(block)]

    def rows(self, order: Tensor) -> None:
        """Select rows."""
        self.values = self.values[order]
        self.mask = None if self.mask is None else self.mask[order]
        self.made = {k: (a[order], b[order]) for k, (a, b) in self.made.items()}
