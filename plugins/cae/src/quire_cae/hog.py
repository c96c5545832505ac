"""Histograms of oriented gradients as a target: edges instead of pixels."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from quire.contracts import Batch, Spec
from quire.errors import ConfigError
from quire.roles.tokens.contract import Layout
from quire.roles.tokens.patches import patchify
from quire.roles.tokens.reconstruct import Target
from quire_cae.examples import tiny_run

BINS = 9
CELL = 8


class HogTarget(Target):
    """Histograms of oriented gradients of each patch. Dalal and Triggs 2005; as a target Wei et al. 2022 (MaskFeat).

    Central differences of the channel with the larger gradient, 9 unsigned orientations weighted by magnitude, over
    cells of 8 pixels (or the whole patch where 8 doesn't divide it), each cell's histogram at length 1.

    Returns:
        [B,N,F] float32, F = 9 times the cells in a patch.

    Raises:
        ConfigError: tokens that are no image patches.
    """

    distance: ClassVar[str] = "mse"

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A context autoencoder on digits that predicts edges."""
        return tiny_run("HogTarget")

    def size(self, spec: Spec) -> int:
        """F."""
        layout = Layout.read(spec.code("segments", self))
        height, width = _cell(layout)
        patch = layout.only().patch
        return BINS * (patch[0] // height) * (patch[1] // width)

    @torch.no_grad()
    def forward(self, batch: Batch, layout: Layout) -> Tensor:
        """[B,N,F]."""
        cell, segment = _cell(layout), layout.only()
        parts = histograms(batch[segment.field].float(), cell)  # [B,9,H/h,W/w]
        return patchify(parts, (segment.patch[0] // cell[0], segment.patch[1] // cell[1]))


def histograms(image: Tensor, cell: tuple[int, int]) -> Tensor:
    """[B,C,H,W] → [B,9,H/h,W/w], the histogram of each cell of h x w pixels, divided by its length."""
    down, right = torch.zeros_like(image), torch.zeros_like(image)
    down[..., 1:-1, :] = image[..., 2:, :] - image[..., :-2, :]
    right[..., 1:-1] = image[..., 2:] - image[..., :-2]
    size = torch.hypot(down, right)
    strongest = size.argmax(1, keepdim=True)
    down, right, size = (t.gather(1, strongest) for t in (down, right, size))
    angle = torch.remainder(torch.atan2(down, right), math.pi)
    place = (angle * (BINS / math.pi)).long().clamp(max=BINS - 1)
    spread = torch.zeros(len(image), BINS, *image.shape[2:], device=image.device).scatter_(1, place, size)
    summed = torch.nn.functional.avg_pool2d(spread, cell)
    return summed / (summed.square().sum(1, keepdim=True) + 1e-10).sqrt()


def _cell(layout: Layout) -> tuple[int, int]:
    segment = layout.only()
    if len(segment.grid) != 2 or segment.field != "image":
        raise ConfigError(f"HogTarget needs image patches; segment {segment.name!r} is cut from {segment.field}")
    patch = segment.patch
    return (CELL, CELL) if patch[0] % CELL == patch[1] % CELL == 0 else (patch[0], patch[1])
