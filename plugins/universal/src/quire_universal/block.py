"""The one block: self-attention, cross-attention where there is a source, transition. Dehghani et al. 2018."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quire.roles.language.blocks import Attention, Source, rotate
from quire_universal.sight import Sight, StepCache

NORMS = ("pre", "post")
TRANSITIONS = ("ffn", "sepconv")
KERNELS = (3, 5)


class Feedforward(nn.Module):
    """Affine, ReLU, affine, for each token alone."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.Dropout(dropout)

    def forward(self, x: Tensor, sight: Sight, cache: StepCache | None) -> Tensor:
        """[B,T,D] → [B,T,D]."""
        return self.down(self.drop(torch.relu(self.up(x))))


class SeparableConv(nn.Module):
    """A depth-wise convolution over tokens, then a linear map: [B,T,C] → [B,T,C'].

    Args:
        given: C.
        made: C'.
        kernel: Tokens seen, odd.
        causal: Whether only earlier tokens and oneself are.
    """

    def __init__(self, given: int, made: int, kernel: int, causal: bool) -> None:
        super().__init__()
        self.kernel, self.causal = kernel, causal
        self.depth = nn.Parameter(torch.empty(given, 1, kernel))
        nn.init.kaiming_uniform_(self.depth, a=5**0.5)
        self.point = nn.Linear(given, made)

    def forward(self, x: Tensor, sight: Sight, cache: StepCache | None) -> Tensor:
        """Padding counts as zeros; with a cache the neighbours are a token's ancestors."""
        if sight.real is not None:
            x = x * sight.real[..., None]
        if cache is None:
            before = self.kernel - 1 if self.causal else self.kernel // 2
            padded = F.pad(x.transpose(1, 2), (before, self.kernel - 1 - before))
            mixed = F.conv1d(padded, self.depth, groups=len(self.depth)).transpose(1, 2)
        else:
            assert sight.taps is not None
            held = cache.put(f"conv{self.kernel}", x, sight)
            mixed = x * self.depth[:, 0, -1]
            row = torch.arange(len(x), device=x.device)[:, None]
            for back in range(self.kernel - 1):
                slot = sight.taps[..., back].expand(len(x), -1)
                near = held[row, slot.clamp(min=0)] * (slot >= 0)[..., None]
                mixed = mixed + near * self.depth[:, 0, self.kernel - 2 - back]
        return self.point(mixed)


class ConvTransition(nn.Module):
    """Separable convolutions of kernels 3 and 5 with ReLU between."""

    def __init__(self, width: int, hidden: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.up = SeparableConv(width, hidden, KERNELS[0], causal)
        self.down = SeparableConv(hidden, width, KERNELS[1], causal)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, sight: Sight, cache: StepCache | None) -> Tensor:
        """[B,T,D] → [B,T,D]."""
        return self.down(self.drop(torch.relu(self.up(x, sight, cache))), sight, cache)


class UniversalBlock(nn.Module):
    """One application: signals are already added to what it is given.

    Args:
        width: D.
        heads: Attention heads.
        ffn: Hidden width of the transition.
        dropout: Of sublayers and attention weights.
        norm: ``pre``: x + f(LN(x)); ``post`` (the paper's): LN(x + f(x)).
        transition: ``ffn`` or ``sepconv``.
        causal: Whether convolutions look back only.
        cross: Whether it attends to a source.
    """

    def __init__(
        self, width: int, heads: int, ffn: int, dropout: float, norm: str, transition: str, causal: bool, cross: bool
    ) -> None:
        super().__init__()
        self.pre = norm == "pre"
        self.attention, self.norm_self = Attention(width, heads, dropout=dropout), nn.LayerNorm(width)
        self.cross = Attention(width, heads, dropout=dropout) if cross else None
        self.norm_cross = nn.LayerNorm(width) if cross else None
        self.transition: nn.Module = (
            Feedforward(width, ffn, dropout) if transition == "ffn" else ConvTransition(width, ffn, dropout, causal)
        )
        self.norm_transition = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)

    @property
    def local(self) -> bool:
        """Whether a token gives later ones keys and values alone, nothing that needs the whole block."""
        return isinstance(self.transition, Feedforward)

    def remember(self, x: Tensor, sight: Sight, cache: StepCache | None) -> tuple[Tensor, Tensor]:
        """Keys and values [B,H,S,Dh] of this step, those of earlier passes included."""
        given = x if sight.frozen is None else sight.frozen
        k, v = self.attention.keys_values(self.norm_self(given) if self.pre else given)
        if sight.turn is not None:
            k = rotate(k, *sight.turn)
        if cache is None:
            return k, v
        k, v = (cache.put(name, t.transpose(1, 2), sight) for name, t in (("keys", k), ("values", v)))
        return k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, sight: Sight, source: Source | None = None, cache: StepCache | None = None) -> Tensor:
        """[B,T,D] → [B,T,D]."""
        k, v = self.remember(x, sight, cache)
        q = self.attention.queries(self.norm_self(x) if self.pre else x)
        if sight.turn is not None:
            q = rotate(q, *sight.turn)
        x = x + self.drop(self.attention.mix(q, k, v, sight.mask, sight.causal and sight.mask is None))
        x = x if self.pre else self.norm_self(x)
        if self.cross is not None and self.norm_cross is not None and source is not None:
            keys, values = source.keys_values(self)  # type: ignore[arg-type]
            asked = self.cross.queries(self.norm_cross(x) if self.pre else x)
            x = x + self.drop(self.cross.mix(asked, keys, values, source.mask))
            x = x if self.pre else self.norm_cross(x)
        x = x + self.drop(self.transition(self.norm_transition(x) if self.pre else x, sight, cache))
        return x if self.pre else self.norm_transition(x)
