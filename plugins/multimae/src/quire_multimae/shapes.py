"""Generated scenes with exact depth and class maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.data import DataModule, Fields, mix
from quire.datasets.pixels import pair
from quire.errors import ConfigError
from quire_multimae.adapters import tiny_run

NAMES = ("background", "disc", "square", "triangle")


class Shapes(DataModule):
    """Generated scenes of discs, squares and triangles with exact depth and class maps; as in Bachmann et al. 2022.

    Shapes of random place, size, colour and depth lie before a slanted wall; nearer ones hide others, and light falls
    off with depth. Synthetic, in every install, the same for the same ``scene_seed``.

    Fields: image [B,3,H,W] in [0,1], depth [B,1,H,W] in metres (1 near, 10 the wall), semantic [B,h,w] int64 (0
    background, 1 disc, 2 square, 3 triangle), label [B]: the shape nearest to the viewer, 0..2.

    Args:
        size: Height and width in pixels.
        objects: Shapes in a scene.
        stride_level: Pixels per cell of the class map.
        length: Training scenes; validation and test have a quarter as many each.
        scene_seed: Seed of the scenes.
        **kwargs: Arguments of ``DataModule``.

    Raises:
        ConfigError: sizes or counts that aren't possible.
    """

    fields = ("image", "depth", "semantic", "label", "index")

    def __init__(
        self,
        size: int | list[int] = 32,
        objects: int = 4,
        stride_level: int = 1,
        length: int = 2048,
        scene_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size = pair(size, "data.size") or (32, 32)
        if objects < 1 or length < 4 or stride_level < 1:
            raise ConfigError(
                f"data.objects and stride_level must be at least 1 and length 4, got {objects}, {stride_level} "
                f"and {length}"
            )
        if self.size[0] % stride_level or self.size[1] % stride_level:
            raise ConfigError(f"{self.size[0]}x{self.size[1]} is not divisible by data.stride_level {stride_level}")
        self.objects, self.stride_level, self.length, self.scene_seed = objects, stride_level, length, scene_seed

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """MultiMAE on scenes of 16 pixels."""
        patch = {"patch": 8}
        maps = {"patch": 8, "stride_level": 2, "embed_dim": 4}
        run = tiny_run({"image": ("PatchAdapter", patch), "semantic": ("ClassMapAdapter", maps)})
        data = {"size": 16, "length": 128, "stride_level": 2}
        return {**run, "data": {"class_path": "Shapes", "init_args": data}}

    def split(self, name: str) -> Fields:
        """One split, drawn from its own seed."""
        count = self.length if name == "train" else self.length // 4
        seed = mix(self.scene_seed, ("train", "val", "test").index(name))
        return Fields(**scenes(count, self.size, self.objects, self.stride_level, seed))

    def sizes(self) -> dict[str, Any]:
        """image_size, channels, classes of the label, and what each modality is."""
        height, width = self.size
        maps = [height // self.stride_level, width // self.stride_level]
        return {
            "image_size": [height, width],
            "channels": 3,
            "classes": 3,
            "modalities": {
                "image": {"channels": 3, "size": [height, width]},
                "depth": {"channels": 1, "size": [height, width]},
                "semantic": {"classes": len(NAMES), "size": maps},
            },
        }


def scenes(count: int, size: tuple[int, int], objects: int, stride: int, seed: int) -> dict[str, Tensor]:
    """``count`` scenes as fields."""
    g = torch.Generator().manual_seed(seed)
    height, width = size
    y = ((torch.arange(height) + 0.5) / height)[None, :, None]
    x = ((torch.arange(width) + 0.5) / width)[None, None, :]

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*(shape or (count, 1, 1)), generator=g)

    depth = 10 + draw(-1, 1) * (x - 0.5) + draw(-1, 1) * (y - 0.5)
    colour = draw(0.3, 0.9, count, 3, 1, 1).expand(-1, -1, height, width).clone()
    kinds = torch.zeros(count, height, width, dtype=torch.long)
    nearest, label = torch.full((count,), torch.inf), torch.zeros(count, dtype=torch.long)
    for _ in range(objects):
        kind = torch.randint(3, (count,), generator=g)
        cx, cy, r, z = draw(0.15, 0.85), draw(0.15, 0.85), draw(0.1, 0.25), draw(1, 8)
        dx, dy = (x - cx) / r, (y - cy) / r
        square = (dx.abs() < 0.9) & (dy.abs() < 0.9)
        triangle = (dy < 0.8) & (dy > 1.8 * dx.abs() - 1)
        forms = torch.stack([dx.square() + dy.square() < 1, square, triangle])
        inside = forms[kind, torch.arange(count)] & (z < depth)
        paint = draw(0.1, 1, count, 3, 1, 1)
        depth = torch.where(inside, z, depth)
        kinds = torch.where(inside, kind[:, None, None] + 1, kinds)
        colour = torch.where(inside[:, None], paint, colour)
        closer = z[:, 0, 0] < nearest
        nearest, label = torch.where(closer, z[:, 0, 0], nearest), torch.where(closer, kind, label)
    light = (1.1 - depth / 14).clamp(0, 1)
    maps = kinds[:, stride // 2 :: stride, stride // 2 :: stride].contiguous()
    image = (colour * light[:, None]).clamp(0, 1)
    return {"image": image, "depth": depth[:, None].contiguous(), "semantic": maps, "label": label}
