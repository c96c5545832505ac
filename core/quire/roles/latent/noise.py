"""Gaussian noise on coordinates: pixels, vectors, codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from quire.contracts import Part
from quire.errors import ConfigError


class CoordinateNoise(Part):
    """Add independent Gaussian noise to every coordinate of a float tensor, in training only.

    Args:
        std: Standard deviation, in the data's unit; 0 changes nothing.
        renormalise: Give each row back the length it had.
        probability: Share of the rows that get noise, in [0, 1].

    Returns:
        A tensor of the same shape; in ``eval()`` the same tensor.

    Raises:
        ConfigError: a negative ``std``, or a ``probability`` outside [0, 1].
    """

    def __init__(self, std: float, renormalise: bool = False, probability: float = 1.0) -> None:
        super().__init__()
        if not std >= 0 or not 0 <= probability <= 1:
            raise ConfigError(f"CoordinateNoise needs std >= 0 and probability in [0, 1], got {std} and {probability}")
        self.std, self.renormalise, self.probability = std, renormalise, probability

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Reconstruct digits from noisy ones."""
        noise = {"class_path": "CoordinateNoise", "init_args": {"std": 0.2}}
        objective = {"class_path": "Reconstruction", "init_args": {"corruption": noise}}
        model = {"encoder": "MlpVectorEncoder", "decoder": "MlpVectorDecoder", "objective": objective}
        return {"model": model, "data": "Digits"}

    def forward(self, values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """``values`` [B,…] with noise in training, as they are in ``eval()``."""
        return self.corrupt(values, generator) if self.training else values

    def corrupt(self, values: Tensor, generator: torch.Generator | None = None, std: float | None = None) -> Tensor:
        """``values`` [B,…] with noise, whatever the mode; ``std`` stands in for the part's own."""
        std = self.std if std is None else std
        if std == 0 or self.probability == 0:
            return values
        draw: dict[str, Any] = {"generator": generator, "device": values.device, "dtype": values.dtype}
        noise = std * torch.randn(values.shape, **draw)
        if self.probability < 1:
            rows = (len(values), *[1] * (values.ndim - 1))
            noise = noise * (torch.rand(rows, **draw) < self.probability)
        noisy = values + noise
        if not self.renormalise:
            return noisy
        length = values.flatten(1).norm(dim=1, keepdim=True)
        return (normalize(noisy.flatten(1), dim=1) * length).view_as(values)
