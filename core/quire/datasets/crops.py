"""Random crops and flips of pictures on their device: one draw a sample, shared by all its aligned fields."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from quire.contracts import Batch, Part
from quire.errors import ConfigError


class RandomResizedCrop(Part):
    """Cut a random box out of each sample and resize it to the picture's own size. Szegedy et al. 2015.

    Aligned fields (image, depth, label maps of any stride) get the same box. A field keeps its height and width.

    Args:
        scale: Least and greatest share of the picture's area, in (0, 1].
        ratio: Least and greatest width over height of the box, above 0; drawn evenly in the logarithm.
        interpolation: How floats are read; ``bicubic`` values are kept within those of the sample.

    Returns:
        The batch; floats [B,C,H,W] are interpolated, integer maps [B,H,W] read at the nearest cell.

    Raises:
        ConfigError: a range that is empty or out of bounds, or another interpolation.
    """

    training_only: ClassVar[bool] = True

    def __init__(
        self,
        scale: list[float] = [0.2, 1.0],  # noqa: B006
        ratio: list[float] = [0.75, 4 / 3],  # noqa: B006
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    ) -> None:
        super().__init__()
        if interpolation not in ("bilinear", "bicubic"):
            raise ConfigError(f"RandomResizedCrop.interpolation is bilinear or bicubic, got {interpolation!r}")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ConfigError(f"RandomResizedCrop.scale must be two shares of the area in (0, 1], got {scale}")
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1]:
            raise ConfigError(f"RandomResizedCrop.ratio must be two numbers above 0 in order, got {ratio}")
        self.scale, self.ratio, self.interpolation = list(scale), list(ratio), interpolation

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Classify cropped digits from raw pixels."""
        return _tiny(cls, {"scale": [0.6, 1.0]})

    def forward(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with every picture read at its sample's box; other fields untouched."""
        pictures = _pictures(batch)
        if not pictures:
            return batch
        lead = max(pictures.values(), key=lambda v: v.shape[-1] * v.shape[-2])
        box = self.boxes(len(lead), lead.shape[-2] / lead.shape[-1], generator)
        return {**batch, **{k: read(v, box, self.interpolation) for k, v in pictures.items()}}

    def boxes(self, count: int, tall: float, generator: torch.Generator) -> Tensor:
        """[B,4] in [-1,1]: centre x and y, half width and height; ``tall`` is the picture's height over its width.

        A box that would be wider or taller than the picture is clipped to it; its place is uniform.
        """
        area, shape, x, y = torch.rand(4, count, generator=generator, device=generator.device)
        area = self.scale[0] + area * (self.scale[1] - self.scale[0])
        low, high = (math.log(r) for r in self.ratio)
        shape = torch.exp(low + shape * (high - low)) * tall  # of the box in shares of the picture
        width = (area * shape).sqrt().clamp(max=1.0)
        height = (area / shape).sqrt().clamp(max=1.0)
        return torch.stack([(2 * x - 1) * (1 - width), (2 * y - 1) * (1 - height), width, height], 1)


class RandomFlip(Part):
    """Mirror samples left to right.

    Args:
        p: Probability for each sample, in [0, 1].

    Raises:
        ConfigError: ``p`` outside [0, 1].
    """

    training_only: ClassVar[bool] = True

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ConfigError(f"RandomFlip.p must be in [0, 1], got {p}")
        self.p = p

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Classify mirrored digits from raw pixels."""
        return _tiny(cls, {})

    def forward(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with some samples mirrored, exactly."""
        pictures = _pictures(batch)
        if not pictures:
            return batch
        count = len(next(iter(pictures.values())))
        chosen = torch.rand(count, generator=generator, device=generator.device) < self.p
        mirrored = {k: torch.where(chosen.view(-1, *[1] * (v.ndim - 1)), v.flip(-1), v) for k, v in pictures.items()}
        return {**batch, **mirrored}


def read(picture: Tensor, box: Tensor, mode: str = "bilinear") -> Tensor:
    """Read boxes [B,4] out of ``picture``, [B,C,H,W] floats or [B,H,W] integers, at its own height and width."""
    height, width = picture.shape[-2:]
    x = _centres(width, box) * box[:, 2:3] + box[:, 0:1]
    y = _centres(height, box) * box[:, 3:4] + box[:, 1:2]
    if picture.ndim == 4:
        grid = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], -1)
        made = grid_sample(picture, grid.to(picture.dtype), mode=mode, padding_mode="border", align_corners=False)
        if mode == "bilinear":
            return made
        return made.clamp(picture.amin((1, 2, 3), keepdim=True), picture.amax((1, 2, 3), keepdim=True))
    columns = ((x + 1) * width / 2).long().clamp(0, width - 1)
    rows = ((y + 1) * height / 2).long().clamp(0, height - 1)
    samples = torch.arange(len(picture), device=picture.device)[:, None, None]
    return picture[samples, rows[:, :, None], columns[:, None, :]]


def _centres(count: int, like: Tensor) -> Tensor:
    """Centres of ``count`` cells that fill [-1, 1]."""
    return ((torch.arange(count, device=like.device) + 0.5) * 2 / count - 1)[None]


def _pictures(batch: Batch) -> dict[str, Tensor]:
    """Floats [B,C,H,W] and integer maps [B,H,W]."""
    tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
    return {k: v for k, v in tensors.items() if v.ndim == (4 if v.is_floating_point() else 3)}


def _tiny(cls: type[Part], arguments: dict[str, Any]) -> dict[str, Any]:
    part = {"class_path": cls.__name__, "init_args": arguments}
    data = {"class_path": "Digits", "init_args": {"train_samples": 128, "transforms": [part]}}
    return {"model": {"encoder": "FlatPixels", "objective": "Classify"}, "data": data}
