"""A transformer over audio frames."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from quire.contracts import Batch, Spec
from quire.errors import ConfigError, DataError
from quire.roles.tokens.contract import Layout, Segment
from quire.roles.tokens.trunk import TrunkEncoder


class FrameEncoder(TrunkEncoder):
    """Plain pre-norm transformer on stacks of frames, without a convolution that could look over a token's border.

    Reads ``frames`` [B,T,F] as they come (scaling them is the data's business: statistics of a whole recording, taken
    here, would leak between tokens) and ``mask`` [B,T] where the batch has it. A token is real when all its frames are.

    Args:
        stack: Frames in one token; it divides T.
        width: D, even for sin-cos positions.
        depth: Number of blocks.
        heads: Attention heads; they divide the width.
        mlp_ratio: Hidden width of the MLP over D.
        class_token: Whether a class token goes before the others; it has no position.
        positions: ``none``, ``sincos`` (fixed, 1-D) or ``learned``.
        key_bias: Whether keys have a bias.
        layer_scale: Start of a learned factor on each residual branch; null for no factor.
        drop_path: Share of residual branches dropped in the last block, rising linearly from 0.
        final_norm: Whether a LayerNorm follows the last block.
        start: Start of the weights: ``normal``, truncated and of deviation 0.02, or ``xavier``, uniform as in MAE.

    Returns:
        Tokens: values [B,T/stack,D].

    Raises:
        ConfigError: sizes that don't divide, an unknown kind of positions.
        DataError: frames with another number of bands than the data's spec.
    """

    fields = ("frames",)

    def __init__(
        self,
        stack: int = 2,
        width: int = 192,
        depth: int = 12,
        heads: int = 3,
        mlp_ratio: float = 4.0,
        class_token: bool = False,
        positions: str = "sincos",
        key_bias: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        final_norm: bool = True,
        start: str = "normal",
    ) -> None:
        super().__init__(
            width, depth, heads, mlp_ratio, class_token, positions, key_bias, layer_scale, drop_path, final_norm, start
        )
        if stack < 1:
            raise ConfigError(f"stack must be at least 1, got {stack}")
        self.stack = stack

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Masked reconstruction of generated speech."""
        trunk = {"width": 16, "depth": 1, "heads": 2}
        return {
            "model": {
                "encoder": {"class_path": "FrameEncoder", "init_args": {**trunk, "class_token": True}},
                "decoder": {"class_path": "GridDecoder", "init_args": trunk},
                "objective": "MaskedReconstruction",
            },
            "data": "SpeechTones",
        }

    def layout(self, source: Batch | Spec) -> Layout:
        """Stacks of a batch's frames, or of a spec's ``frames`` (T)."""
        given = source["frames"] if "frames" in source else Spec(source).need("frames", self)
        count = given.shape[1] if isinstance(given, Tensor) else int(given)
        if count % self.stack:
            raise ConfigError(f"{count} frames are not divisible by stack {self.stack}; pad or cut them")
        return Layout.of(Segment("frames", (count // self.stack,), (self.stack,), "frames"))

    def token_mask(self, batch: Batch) -> Tensor | None:
        """[B,T/stack], True where all frames of a token are real."""
        mask = batch.get("mask")
        return None if mask is None else mask.unflatten(1, (-1, self.stack)).all(2)

    def make_stem(self, spec: Spec) -> nn.Module:
        """One linear map of a stack."""
        self.bands = int(spec.need("bands", self))
        return nn.Linear(self.stack * self.bands, self.width)

    def cut(self, batch: Batch) -> Tensor:
        """Stacks [B,T/stack,stack*F]."""
        frames = batch["frames"]
        if frames.shape[-1] != self.bands:
            raise DataError(f"frames have {frames.shape[-1]} bands, FrameEncoder was built for {self.bands}")
        return frames.reshape(len(frames), -1, self.stack * self.bands)

    def sizes(self) -> dict[str, Any]:
        """As every token encoder, and ``patch_values``, the numbers in one stack."""
        return {**super().sizes(), "patch_values": self.stack * self.bands}
