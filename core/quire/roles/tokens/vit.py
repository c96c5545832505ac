"""A plain vision transformer over image patches."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from quire.contracts import Batch, Spec
from quire.errors import DataError
from quire.roles.tokens.contract import Layout, Segment
from quire.roles.tokens.patches import pair, patch_grid, patchify
from quire.roles.tokens.timm_weights import TimmWeights, trunk_weights
from quire.roles.tokens.trunk import TrunkEncoder


class PatchStem(nn.Module):
    """Patches in [0,1] → tokens: (x - 0.5) / 0.5, then one linear map, which is a convolution without overlap."""

    def __init__(self, values: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(values, width)

    def forward(self, patches: Tensor) -> Tensor:
        """[B,K,C*ph*pw] → [B,K,D]."""
        return self.proj((patches - 0.5) / 0.5)


class ViTEncoder(TrunkEncoder):
    """Plain pre-norm vision transformer on image patches. Dosovitskiy et al. 2021.

    Reads ``image`` [B,C,H,W] in [0,1] and shifts it to [-1,1] itself. Image size and channels come from the data.

    Args:
        patch: Patch size in pixels, one number or [height, width].
        width: D; divisible by 4 for sin-cos positions.
        depth: Number of blocks.
        heads: Attention heads; they divide the width.
        mlp_ratio: Hidden width of the MLP over D.
        class_token: Whether a class token goes before the patches; it has no position.
        positions: ``none``, ``sincos`` (fixed) or ``learned``.
        key_bias: Whether keys have a bias.
        layer_scale: Start of a learned factor on each residual branch; null for no factor.
        drop_path: Share of residual branches dropped in the last block, rising linearly from 0.
        final_norm: Whether a LayerNorm follows the last block.
        start: Start of the weights: ``normal``, truncated and of deviation 0.02, or ``xavier``, uniform as in MAE.

    Returns:
        Tokens: values [B,N,D] (or the kept ones), prefix [B,0 or 1,D].

    Raises:
        ConfigError: sizes that don't divide, an unknown kind of positions.
        DataError: an image with other channels than the data's spec.
    """

    fields = ("image",)
    capabilities = TrunkEncoder.capabilities | {"grid"}

    def __init__(
        self,
        patch: int | list[int] = 16,
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
        self.patch = pair(patch, "patch")

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A masked autoencoder on digits."""
        trunk = {"width": 16, "depth": 1, "heads": 2}
        return {
            "model": {
                "encoder": {"class_path": "ViTEncoder", "init_args": {"patch": 2, **trunk, "class_token": True}},
                "decoder": {"class_path": "GridDecoder", "init_args": trunk},
                "objective": "MaskedReconstruction",
            },
            "data": "Digits",
        }

    def layout(self, source: Batch | Spec) -> Layout:
        """The grid of patches of a batch's image or a spec's ``image_size``."""
        if "image" in source:
            height, width = source["image"].shape[-2:]
        else:
            height, width = pair(Spec(source).need("image_size", self), "image_size")
        return Layout.of(Segment("image", patch_grid(height, width, self.patch), self.patch, "image"))

    def make_stem(self, spec: Spec) -> nn.Module:
        """Shift and linear map."""
        self.channels = int(spec.need("channels", self))
        return PatchStem(self.channels * self.patch[0] * self.patch[1], self.width)

    def cut(self, batch: Batch) -> Tensor:
        """Patches [B,N,C*ph*pw]."""
        image = batch["image"]
        if not image.is_floating_point():
            raise DataError(f"image is {str(image.dtype).removeprefix('torch.')}; convert to float in [0,1]")
        if image.shape[1] != self.channels:
            raise DataError(f"image has {image.shape[1]} channels, ViTEncoder was built for {self.channels}")
        return patchify(image, self.patch)

    def to_timm(self) -> TimmWeights:
        """The same network as timm's ``VisionTransformer``, where images in [0,1] are shifted to [-1,1] before."""
        half = [0.5] * self.channels
        return trunk_weights(self, self.stem.proj, self.built_layout.only(), self.channels, half, half)

    def sizes(self) -> dict[str, Any]:
        """As every token encoder, and ``patch_values``, the numbers in one patch."""
        return {**super().sizes(), "patch_values": self.channels * self.patch[0] * self.patch[1]}
