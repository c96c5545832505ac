"""Interpretability measured, not asserted: R1 and R2 on all training data, coverage, use, nearness to real images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.contracts import Batch, Losses, Metric
from quire.model import Model
from quire_prototypes.modules import AUTOENCODER, PrototypeLayer, codes_of, layer_of
from quire_prototypes.training import Scan, need_source, scan


def _tiny(name: str) -> dict[str, Any]:
    return {"model": {**AUTOENCODER, "objective": "CaseBasedReasoning", "metrics": [name]}, "data": "Digits"}


class _Once(Metric):
    """A number that is the same for every batch of an evaluation: taken at the first one."""

    decoder: PrototypeLayer
    higher_is_better: bool | None = False
    full_state_update = False
    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("value", torch.tensor(0.0), dist_reduce_fx="mean")  # equal on all ranks

    def measure(self, model: Model) -> Tensor:
        """The number."""
        raise NotImplementedError

    def observe(self, model: Model, batch: Batch, losses: Losses) -> None:
        """Measure at the first batch."""
        if not self.update_called:
            self.update(self.measure(model))

    def update(self, value: Tensor) -> None:
        """Keep ``value``."""
        self.value = value.detach().to(self.value)

    def compute(self) -> Tensor:
        """What was measured."""
        return self.value

    def _scan(self, model: Model) -> Scan:
        return scan(model, need_source(model, self))


class R1Full(_Once):
    """R1 over all training data: mean squared distance from a prototype to its nearest code. Li et al. 2018.

    Returns:
        A scalar; 0 when every prototype is a training code. The loss term takes the batch only, so it is larger.

    Raises:
        ConfigError: no data module.
    """

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Measured on digits."""
        return _tiny("R1Full")

    def measure(self, model: Model) -> Tensor:
        """One pass over the training split, shared with the other metrics."""
        return self._scan(model).r1


class R2Full(_Once):
    """R2 over all training data: mean squared distance from a code to its nearest prototype. Li et al. 2018.

    Returns:
        A scalar; 0 when every training code is a prototype.

    Raises:
        ConfigError: no data module.
    """

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Measured on digits."""
        return _tiny("R2Full")

    def measure(self, model: Model) -> Tensor:
        """One pass over the training split, shared with the other metrics."""
        return self._scan(model).r2


class PrototypePixelDistance(_Once):
    """How real prototypes look: squared pixel distance of each decoded one to the nearest training image, averaged.

    Not in the paper, which shows the pictures (Li et al. 2018).

    Returns:
        A scalar, summed over pixels, mean over prototypes.

    Raises:
        ConfigError: no data module, or no PixelDecoder in the layer.
    """

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Measured on digits."""
        return _tiny("PrototypePixelDistance")

    def check(self, model: Model) -> None:
        """Prototypes must decode to pixels."""
        layer_of(model).pixels()

    def measure(self, model: Model) -> Tensor:
        """One pass over the training split, shared with the other metrics."""
        pixels = self._scan(model).pixels
        assert pixels is not None, "check() asked for a PixelDecoder"
        return pixels.mean()


class PrototypeClassCoverage(_Once):
    """How many classes own a prototype, that is, are some prototype's most negative weight. After Li et al. 2018.

    Returns:
        A scalar between 1 and the number of classes. A class that owns none has no case to be explained by.
    """

    higher_is_better = True

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Counted on digits."""
        return _tiny("PrototypeClassCoverage")

    def measure(self, model: Model) -> Tensor:
        """Count."""
        return torch.tensor(float(len(layer_of(model).owners().unique())))


class PrototypesUsed(Metric):
    """How many prototypes are the nearest one of at least one evaluated sample. After Li et al. 2018.

    Returns:
        A scalar between 1 and m. A duplicate counts as unused: the first of equals is nearest.
    """

    decoder: PrototypeLayer
    higher_is_better = True
    full_state_update = False
    used: Tensor

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Counted on digits."""
        return _tiny("PrototypesUsed")

    def bind(self, model: Model) -> None:
        """One mark a prototype."""
        self.add_state("used", torch.zeros(layer_of(model).count), dist_reduce_fx="max")

    def observe(self, model: Model, batch: Batch, losses: Losses) -> None:
        """Mark the nearest prototypes of one batch."""
        distances = losses.outputs.get("distances")
        if distances is None:
            distances = layer_of(model).distances(codes_of(model, batch))
        self.update(distances)

    def update(self, distances: Tensor) -> None:
        """Mark the nearest prototype of each row of ``distances`` [B,m]."""
        self.used[distances.detach().min(dim=1).indices] = 1

    def compute(self) -> Tensor:
        """Count the marks."""
        return self.used.sum()
