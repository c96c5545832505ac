"""Elastic deformation of a batch of images on its device, anew for every training batch."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from quire.contracts import Batch, Part
from quire.errors import ConfigError


class ElasticDeformation(Part):
    """Bend images by a smoothed random displacement field. Li et al. 2018, official code; after Simard et al. 2003.

    Every pixel of every image draws a row and a column displacement from U[-1, 1]; a Gaussian filter with a zero
    border smooths them; the image is read bilinearly at the displaced places, 0 outside. One field serves all
    channels. An autoencoder then reconstructs the deformed image: it is input and target.

    Args:
        sigma: Standard deviation of the Gaussian filter, in pixels, above 0.
        alpha: Factor on the smoothed field, in pixels; 0 leaves images as they are.
        p: Probability that an image is deformed, in [0, 1].

    Returns:
        The batch with another ``image`` [B,C,H,W], same range; other fields untouched.

    Raises:
        ConfigError: ``sigma`` not above 0, a negative ``alpha``, or ``p`` outside [0, 1].
    """

    fields = ("image",)
    training_only: ClassVar[bool] = True

    def __init__(self, sigma: float = 4.0, alpha: float = 20.0, p: float = 1.0) -> None:
        super().__init__()
        if sigma <= 0 or alpha < 0 or not 0 <= p <= 1:
            raise ConfigError(
                f"ElasticDeformation needs sigma > 0, alpha >= 0 and p in [0, 1], got {sigma}, {alpha} and {p}"
            )
        self.sigma, self.alpha, self.p = sigma, alpha, p

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Classify slightly bent digits from raw pixels."""
        bend = {"class_path": "ElasticDeformation", "init_args": {"sigma": 1.0, "alpha": 2.0}}
        data = {"class_path": "Digits", "init_args": {"train_samples": 128, "transforms": [bend]}}
        return {"model": {"encoder": "FlatPixels", "objective": "Classify"}, "data": data}

    def forward(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Deform ``batch["image"]``; the draws come from ``generator``."""
        image: Tensor = batch["image"]
        if self.alpha == 0 or self.p == 0:
            return batch
        count, _, height, width = image.shape
        noise = torch.rand(count, 2, height, width, generator=generator, device=image.device) * 2 - 1
        bent = deform(image, self.alpha * smooth(noise, self.sigma))
        if self.p < 1:
            chosen = torch.rand(count, generator=generator, device=image.device) < self.p
            bent = torch.where(chosen[:, None, None, None], bent, image)
        return {**batch, "image": bent}


def smooth(field: Tensor, sigma: float) -> Tensor:
    """Gaussian filter of the last two axes, cut off at 4 sigma, zero border: two products with a band matrix."""
    rows, columns = (_band(n, sigma, field) for n in field.shape[-2:])
    return rows @ field @ columns


def _band(size: int, sigma: float, like: Tensor) -> Tensor:
    """[n,n] symmetric: row i holds the Gaussian around i, normalised before the border cuts it."""
    reach = int(4 * sigma + 0.5)
    kernel = [math.exp(-0.5 * (d / sigma) ** 2) for d in range(reach + 1)]
    total = kernel[0] + 2 * sum(kernel[1:])
    weights = torch.tensor([*kernel, 0.0], dtype=torch.float64) / total
    place = torch.arange(size)
    gap = (place[:, None] - place[None, :]).abs().clamp(max=reach + 1)
    return weights[gap].to(like)


def deform(image: Tensor, displacement: Tensor) -> Tensor:
    """Read ``image`` [B,C,H,W] at its grid plus ``displacement`` [B,2,H,W] (rows, columns; pixels), 0 outside it."""
    height, width = image.shape[-2:]
    rows = torch.arange(height, device=image.device)[:, None] + displacement[:, 0]
    columns = torch.arange(width, device=image.device)[None, :] + displacement[:, 1]
    inside = (rows >= 0) & (rows <= height - 1) & (columns >= 0) & (columns <= width - 1)
    scaled = [2 * at / max(1, n - 1) - 1 for at, n in ((columns, width), (rows, height))]
    grid = torch.stack(scaled, dim=-1).to(image.dtype)
    read = grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return read * inside[:, None]
