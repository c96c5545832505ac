"""The decoder: latents of masked cells to targets, with nothing else to look at."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from quire.contracts import Decoder, Spec, build
from quire.errors import ConfigError
from quire.roles.tokens.blocks import make_blocks, run, xavier
from quire.roles.tokens.contract import Layout
from quire.roles.tokens.reconstruct import Target
from quire_cae.examples import tiny_run
from quire_cae.places import Places


class MaskedTokenDecoder(Decoder):
    """Latents of the masked cells → a prediction for each of them. Chen et al. 2022 (CAE).

    Self-attention among the masked cells only, with their places; no visible token and no class token, so what is
    known of the visible cells comes through the latents alone.

    Args:
        depth: Number of blocks.
        width: Width of the latents; null takes the regressor's.
        heads: Attention heads; they divide the width.
        layer_scale: Start of a learned factor on each residual branch; null for none.
        drop_path: Share of residual branches dropped in the last block, rising linearly from 0.
        output_size: Numbers or classes for each cell; null takes them from the objective's target.

    Returns:
        [B,M,V] logits, or [B,M,F] numbers.

    Raises:
        ConfigError: sizes that don't divide, or that differ from the regressor's or the target's.
    """

    def __init__(
        self,
        depth: int = 4,
        width: int | None = None,
        heads: int = 12,
        layer_scale: float | None = 0.1,
        drop_path: float = 0.0,
        output_size: int | None = None,
    ) -> None:
        super().__init__()
        self.depth, self.width, self.heads = depth, width, heads
        self.layer_scale, self.drop_path, self.output_size = layer_scale, drop_path, output_size
        self.refer("target", None)
        self.latents: int | None = None

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A context autoencoder on digits."""
        return tiny_run()

    def predicts(self, target: Target, latents: int | None) -> None:
        """Take the sizes from ``target`` and the regressor's width; an objective says so before anything is built."""
        asked = self.__dict__["target"]
        if asked is not None and asked is not target:
            raise ConfigError(f"MaskedTokenDecoder predicts {type(asked).__name__} for another objective already")
        self.refer("target", target)
        self.latents = latents

    def build(self, spec: Spec) -> None:
        """Make the trunk and the head."""
        super().build(spec)
        latents = self.latents or int(spec.code("width", self))
        width = self.width or latents
        if self.__dict__["target"] is not None and width != latents:
            raise ConfigError(
                f"MaskedTokenDecoder has width={width}, the latents have {latents}: drop decoder.width, "
                "or set regressor.width to it"
            )
        self.init_args |= {"width": width, "output_size": self._size(spec)}  # reloads without the objective
        self.places = Places(Layout.read(spec.code("segments", self)), width)
        self.blocks = make_blocks(
            width,
            self.depth,
            self.heads,
            key_bias=False,
            layer_scale=self.layer_scale,
            drop_path=self.drop_path,
            start="xavier",
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = xavier(nn.Linear(width, self.init_args["output_size"]))

    def _size(self, spec: Spec) -> int:
        target: Target | None = self.__dict__["target"]
        if target is None:
            if self.output_size is None:
                raise ConfigError("MaskedTokenDecoder has no target to predict: set decoder.output_size")
            return self.output_size
        build(target, spec)
        wanted = target.size(spec)
        if self.output_size not in (None, wanted):
            what = "codes" if target.gives_ids else "numbers"
            raise ConfigError(
                f"target has {wanted} {what} but the head has {self.output_size}: drop decoder.output_size"
            )
        return wanted

    def forward(self, latents: Tensor, masked: Tensor, layout: Layout) -> Tensor:
        """Predict.

        Args:
            latents: [B,M,width] of the masked cells.
            masked: [B,M] int64, these cells.
            layout: Places of all N cells.
        """
        x = latents + self.places(layout)[masked].to(latents.dtype)
        return self.head(self.norm(run(self.blocks, x)))
