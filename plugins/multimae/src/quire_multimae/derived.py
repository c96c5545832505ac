"""Modalities that are functions of the picture: Sobel edges and quantised levels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quire.contracts import Batch, Part
from quire.datasets.pixels import GREY
from quire.errors import ConfigError
from quire_multimae.adapters import TINY_MODALITIES, tiny_run


def grey(image: Tensor) -> Tensor:
    """[B,C,H,W] → [B,1,H,W]: luma of three channels, else the mean."""
    if image.shape[1] == 3:
        return (image * image.new_tensor(GREY)[:, None, None]).sum(1, keepdim=True)
    return image.mean(1, keepdim=True)


def sobel(image: Tensor) -> Tensor:
    """Gradient magnitude by Sobel's filters, border repeated, divided by its largest possible value.

    Args:
        image: [B,C,H,W] in [0,1].

    Returns:
        [B,1,H,W] in [0,1].
    """
    across = image.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    kernel = torch.stack([across, across.T])[:, None] / (4 * 2**0.5)
    both = F.conv2d(F.pad(grey(image), (1, 1, 1, 1), mode="replicate"), kernel)
    return both.square().sum(1, keepdim=True).sqrt().clamp(max=1)


def quantize(image: Tensor, levels: int) -> Tensor:
    """[B,C,H,W] in [0,1] → [B,H,W] int64: which of ``levels`` equal intervals the grey value lies in."""
    return (grey(image)[:, 0] * levels).long().clamp(0, levels - 1)


class DerivedModalities(Part):
    """Give any image data ``edges`` and ``semantic``, for MultiMAE without paired data; after Bachmann et al. 2022.

    Edges are Sobel's gradient magnitude [B,1,H,W] in [0,1]; semantic [B,H,W] the level of the grey value. Both are
    functions of the image: they show transfer between forms, not new information.

    Args:
        levels: Number of levels, the classes of ``semantic``.

    Raises:
        ConfigError: fewer than 2 levels.
    """

    fields = ("image",)

    def __init__(self, levels: int = 4) -> None:
        super().__init__()
        if levels < 2:
            raise ConfigError(f"DerivedModalities.levels must be at least 2, got {levels}")
        self.levels = levels

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """MultiMAE on digits whose modalities are derived batch by batch."""
        made: dict[str, tuple[str, dict[str, Any]]] = dict(TINY_MODALITIES)
        made["edges"] = ("PatchAdapter", {"patch": 4, "channels": 1})
        made["semantic"] = ("ClassMapAdapter", {**TINY_MODALITIES["semantic"][1], "classes": 4})
        data = {"train_samples": 128, "transforms": [{"class_path": "DerivedModalities"}]}
        return {**tiny_run(made), "data": {"class_path": "Digits", "init_args": data}}

    def forward(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with ``edges`` and ``semantic``."""
        image = batch["image"]
        return {**batch, "edges": sobel(image), "semantic": quantize(image, self.levels)}
