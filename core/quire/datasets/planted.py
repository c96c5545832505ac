"""Activations with a known dictionary: sums of a few planted directions, so what was found can be checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from quire.data import SPLITS, DataModule, Fields, mix
from quire.errors import ConfigError


class PlantedFeatures(DataModule):
    """Each row is the sum of a few random unit directions with random magnitudes, plus noise. No language model needed.

    Directions depend on ``features_seed`` alone; the three splits draw rows of their own.

    Args:
        width: D.
        features: Number of planted directions; may exceed D.
        active: Directions in each row, drawn without replacement.
        low: Least magnitude.
        high: Largest magnitude; magnitudes are uniform between the two.
        noise: Standard deviation of the noise on each of the D numbers.
        samples: Training rows; validation and test have an eighth each.
        features_seed: Seed of the directions and rows.
        **kwargs: Arguments of ``DataModule``.

    Returns:
        ``activation`` [N,D]. ``directions`` [features,D] is the truth.

    Raises:
        ConfigError: a size below 1, more active directions than there are, or magnitudes that don't rise from above 0.
    """

    fields = ("activation",)

    def __init__(
        self,
        width: int = 32,
        features: int = 64,
        active: int = 3,
        low: float = 0.5,
        high: float = 1.5,
        noise: float = 0.01,
        samples: int = 65536,
        features_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if min(width, features, active, samples) < 1:
            raise ConfigError("PlantedFeatures needs width, features, active and samples of at least 1")
        if active > features:
            raise ConfigError(f"PlantedFeatures.active ({active}) exceeds features ({features})")
        if not 0 < low <= high or noise < 0:
            raise ConfigError(f"PlantedFeatures needs 0 < low <= high and noise >= 0, got {low}, {high} and {noise}")
        self.width, self.features, self.active = width, features, active
        self.low, self.high, self.noise, self.samples = low, high, noise, samples
        self.features_seed = features_seed
        source = torch.Generator().manual_seed(mix(features_seed))
        self.directions: Tensor = normalize(torch.randn(features, width, generator=source), dim=1)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A dictionary of 24 latents on 12 directions."""
        from quire.roles.sparse.selector import tiny_run

        return tiny_run({"class_path": "TopK", "init_args": {"k": 2}})

    def sizes(self) -> dict[str, Any]:
        """``width``."""
        return {"width": self.width}

    def split(self, name: str) -> Fields:
        """Draw one split."""
        source = torch.Generator().manual_seed(mix(self.features_seed, 1 + SPLITS.index(name)))
        count = self.samples if name == "train" else max(1, self.samples // 8)
        chosen = torch.rand(count, self.features, generator=source).topk(self.active, 1).indices
        size = self.low + (self.high - self.low) * torch.rand(count, self.active, generator=source)
        weights = torch.zeros(count, self.features).scatter_(1, chosen, size)
        rows = weights @ self.directions
        return Fields(activation=rows + self.noise * torch.randn(count, self.width, generator=source))
