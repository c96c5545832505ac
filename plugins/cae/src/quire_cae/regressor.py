"""The latent contextual regressor: what the encoder would say of cells that it did not see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from quire.contracts import Part, Spec
from quire.errors import ConfigError
from quire.roles.tokens.blocks import start_weights
from quire.roles.tokens.contract import Layout, Tokens
from quire_cae.examples import tiny_run
from quire_cae.places import Places


class DropPath(nn.Module):
    """Drop a residual branch of whole samples with probability ``p`` in training, and scale up the others."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """[B,…] → the same shape."""
        if not self.p or not self.training:
            return x
        kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.p
        return x * kept / (1 - self.p)


class RegressorBlock(nn.Module):
    """One cross-attention of the masked tokens m over visible and masked tokens, then an MLP on m alone.

    Args:
        width: D. heads: attention heads. layer_scale: start of g1 and g2, null for none. drop_path: share of
            branches dropped. stream_norm: whether the second norm replaces the residual stream.
    """

    def __init__(self, width: int, heads: int, layer_scale: float | None, drop_path: float, stream_norm: bool) -> None:
        super().__init__()
        self.heads, self.stream_norm = heads, stream_norm
        self.norm_q, self.norm_k, self.norm_v, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(4))
        self.q, self.v, self.proj = (nn.Linear(width, width) for _ in range(3))
        self.k = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.g1, self.g2 = (
            None if layer_scale is None else nn.Parameter(torch.full((width,), float(layer_scale))) for _ in range(2)
        )
        self.drop = DropPath(drop_path)
        start_weights(self, "xavier")

    def forward(self, m: Tensor, z: Tensor, place_m: Tensor, place_z: Tensor) -> Tensor:
        """m [B,M,D] and z [B,K,D] with their places → m [B,M,D]; z stays as it is."""
        source = torch.cat([z, m], 1)
        q = self._split(self.q(self.norm_q(m + place_m)))
        k = self._split(self.k(self.norm_k(source + torch.cat([place_z, place_m], 1))))
        v = self._split(self.v(self.norm_v(source)))  # contents only: no place is ever a value
        seen = self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        m = m + self.drop(seen if self.g1 is None else self.g1 * seen)
        normed = self.norm2(m)
        made = self.mlp(normed)
        return (normed if self.stream_norm else m) + self.drop(made if self.g2 is None else self.g2 * made)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class LatentRegressor(Part):
    """Predict the latents of masked cells from the latents of the visible ones. Chen et al. 2022 (CAE).

    Queries start as one shared mask token; each block lets them look at the visible latents and at each other.
    Places are on queries and keys, never on values; class tokens take no part. The visible latents don't change.

    Args:
        depth: Number of blocks.
        width: Width of the predicted latents; null takes the encoder's. Another width maps visible latents and the
            alignment target through one linear map and norm.
        heads: Attention heads; they divide the width.
        layer_scale: Start of a learned factor on each residual branch; null for none.
        stream_norm: Let each block's second norm replace the residual stream, as the paper's code does; false is the
            usual pre-norm block.
        drop_path: Share of residual branches dropped in training, in [0, 1).

    Needs:
        The visible cells' tokens [B,K,D] of a TokenEncoder and the masked cells [B,M].

    Returns:
        [B,M,width], after a final norm.

    Raises:
        ConfigError: heads that don't divide the width, ``depth`` below 1, ``drop_path`` outside [0,1).
    """

    def __init__(
        self,
        depth: int = 4,
        width: int | None = None,
        heads: int = 12,
        layer_scale: float | None = 0.1,
        stream_norm: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ConfigError(f"LatentRegressor.depth must be at least 1, got {depth}")
        if not 0 <= drop_path < 1:
            raise ConfigError(f"LatentRegressor.drop_path must be in [0,1), got {drop_path:g}")
        self.depth, self.width, self.heads = depth, width, heads
        self.layer_scale, self.stream_norm, self.drop_path = layer_scale, stream_norm, drop_path

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A context autoencoder on digits whose regressor is narrower than its encoder."""
        return tiny_run(regressor={"class_path": "LatentRegressor", "init_args": {"depth": 1, "width": 8, "heads": 2}})

    def build(self, spec: Spec) -> None:
        """Make the blocks for the encoder's width and cells."""
        super().build(spec)
        given = int(spec.code("width", self))
        width = self.width or given
        if self.heads < 1 or width % self.heads:
            raise ConfigError(f"LatentRegressor has width={width}, not divisible by heads={self.heads}")
        self.inlet = nn.Identity()
        if width != given:
            self.inlet = nn.Sequential(nn.Linear(given, width), nn.LayerNorm(width, eps=1e-6))  # type: ignore[assignment]
            start_weights(self.inlet, "xavier")
        self.empty = nn.Parameter(torch.randn(width) * 0.02)
        self.places = Places(Layout.read(spec.code("segments", self)), width)
        self.blocks = nn.ModuleList(
            RegressorBlock(width, self.heads, self.layer_scale, self.drop_path, self.stream_norm)
            for _ in range(self.depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, visible: Tokens, masked: Tensor) -> Tensor:
        """Predict.

        Args:
            visible: The encoder's tokens of the visible cells [B,K,D]; their prefix is ignored.
            masked: [B,M] int64, the cells to predict.
        """
        places = self.places(visible.layout).to(visible.values.dtype)
        z = self.inlet(visible.values)
        m = self.empty.to(z.dtype).expand(*masked.shape, -1)
        for block in self.blocks:
            m = block(m, z, places[masked], places[visible.index])
        return self.norm(m)

    @torch.no_grad()
    def project(self, latents: Tensor) -> Tensor:
        """The encoder's latents [B,M,D] as alignment targets [B,M,width], without a gradient."""
        return self.inlet(latents)
