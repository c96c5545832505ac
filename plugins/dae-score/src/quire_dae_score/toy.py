"""Points in the plane whose density is known, so that a learnt score can be checked."""

from __future__ import annotations

from typing import Any, Literal

import torch

from quire.data import SPLITS, DataModule, Fields, mix
from quire.errors import ConfigError
from quire.model import Model
from quire_dae_score.densities import DENSITIES, Density
from quire_dae_score.modules import tiny_run


class ToyDensity(DataModule):
    """Draws of a density in the plane with exact log p, score and convolution. After Alain and Bengio 2012.

    Args:
        kind: ``"gaussian"`` of variances 2 and 1 and covariance 0.8, ``"mixture"`` of two Gaussians 4 apart, ``"ring"``
            of radius 2, ``"spiral"`` of two turns within 0.65 of 0, or ``"ninja_star"``, a ring with four thorns.
        samples: Training rows; validation and test have an eighth each.
        seed: Of the draws and the order.
        **kwargs: Arguments of ``DataModule``.

    Returns:
        ``vector`` [B,2]. ``density`` is the truth.

    Raises:
        ConfigError: an unknown ``kind``, or fewer than 8 samples.
    """

    fields = ("vector", "index")

    def __init__(
        self,
        kind: Literal["gaussian", "mixture", "ring", "spiral", "ninja_star"] = "mixture",
        samples: int = 20000,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(seed=seed, **kwargs)
        if kind not in DENSITIES:
            raise ConfigError(f"ToyDensity.kind must be {', '.join(DENSITIES)}, got {kind!r}")
        if samples < 8:
            raise ConfigError(f"ToyDensity.samples must be at least 8, got {samples}")
        self.kind, self.samples = kind, samples
        self.density: Density = DENSITIES[kind]()

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Denoise points of two modes."""
        return tiny_run()

    def sizes(self) -> dict[str, Any]:
        """``width``."""
        return {"width": 2}

    def split(self, name: str) -> Fields:
        """Draw one split."""
        source = torch.Generator().manual_seed(mix(self.seed, SPLITS.index(name)))
        count = self.samples if name == "train" else self.samples // 8
        return Fields(vector=self.density.sample(count, source))


def density_of(model: Model, asker: object) -> Density:
    """The density of the run's data. Raises ``ConfigError`` when it isn't known."""
    found = getattr(model.datamodule, "density", None)
    if not isinstance(found, Density):
        name = type(asker).__name__
        raise ConfigError(f"{name} compares with the truth, which only ToyDensity has: drop it from model.metrics")
    return found
