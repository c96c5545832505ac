"""The two-dimensional toy of Träuble et al. 2023: Gaussians on a grid, one class each."""

from __future__ import annotations

import math
from typing import Any

import torch

from quire.data import SPLITS, DataModule, Fields, mix
from quire.errors import ConfigError


class ToyGaussians(DataModule):
    """Points in the unit square, a small Gaussian a class, its mean on a grid. Träuble et al. 2023.

    A point is an image of two pixels, so encoders of images read it; ``FlatPixels`` is the identity. Points are clipped
    to the square.

    Args:
        classes: Gaussians.
        samples: Training points a class; validation and test have a fifth each.
        std: Standard deviation.
        points_seed: Of the points and of which grid place is which class.
        **kwargs: Arguments of ``DataModule``.

    Returns:
        ``image`` [B,1,1,2] in [0,1], ``label`` [B].

    Raises:
        ConfigError: a count below 1, or a negative ``std``.
    """

    fields = ("image", "label", "index")

    def __init__(
        self, classes: int = 8, samples: int = 100, std: float = 0.035, points_seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if classes < 1 or samples < 1 or std < 0:
            raise ConfigError(f"ToyGaussians needs classes, samples >= 1 and std >= 0, got {classes}, {samples}, {std}")
        self.classes, self.samples, self.std, self.points_seed = classes, samples, std, points_seed

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A linear map of the points."""
        return {"model": {"encoder": "FlatPixels", "objective": "Classify"}, "data": "ToyGaussians"}

    def split(self, name: str) -> Fields:
        """Draw one split."""
        side = math.ceil(math.sqrt(self.classes))
        source = torch.Generator().manual_seed(mix(self.points_seed))
        places = torch.randperm(side * side, generator=source)[: self.classes]
        means = (torch.stack([places // side, places % side], 1) + 0.5) / side
        source = torch.Generator().manual_seed(mix(self.points_seed, 1 + SPLITS.index(name)))
        count = self.samples if name == "train" else max(1, self.samples // 5)
        label = torch.arange(self.classes).repeat_interleave(count)
        points = means[label] + self.std * torch.randn(len(label), 2, generator=source)
        return Fields(image=points.clamp(0, 1)[:, None, None], label=label)

    def sizes(self) -> dict[str, Any]:
        """image_size, channels, classes."""
        return {"image_size": [1, 2], "channels": 1, "classes": self.classes}
