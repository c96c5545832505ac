"""Learning-rate schedules: a factor for each optimizer step."""

from __future__ import annotations

import math
from typing import Any

from quire.contracts import Part
from quire.errors import ConfigError


class Schedule(Part):
    """Role of a schedule: step → factor of the learning rate."""

    def factor(self, step: int, total: float) -> float:
        """Factor at optimizer step ``step`` of ``total`` (infinite when the run has no end)."""
        raise NotImplementedError

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Classify digits from raw pixels with this schedule."""
        model = {"encoder": "FlatPixels", "objective": "Classify", "schedule": cls.__name__}
        return {"model": model, "data": "Digits"}


class WarmupCosine(Schedule):
    """Linear warm-up, then a half cosine down to a floor.

    Args:
        warmup: Length of the warm-up: a share of all steps below 1, a number of steps from 1 on.
        floor: Factor at the end, in [0, 1].

    Raises:
        ConfigError: a negative ``warmup``, or ``floor`` outside [0, 1].
    """

    def __init__(self, warmup: float = 0.05, floor: float = 0.0) -> None:
        super().__init__()
        if warmup < 0 or not 0 <= floor <= 1:
            raise ConfigError(f"schedule needs warmup >= 0 and floor in [0, 1], got {warmup} and {floor}")
        self.warmup, self.floor = warmup, floor

    def factor(self, step: int, total: float) -> float:
        """Factor at ``step`` of ``total``; 1 after the warm-up when there is no end."""
        rise = self.warmup if self.warmup >= 1 or math.isinf(total) else self.warmup * total
        if step < rise:
            return (step + 1) / (rise + 1)
        if math.isinf(total):
            return 1.0
        done = min(1.0, (step - rise) / max(1.0, total - rise))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))


class Constant(Schedule):
    """The learning rate as the optimizer has it."""

    def factor(self, step: int, total: float) -> float:
        """Always 1."""
        return 1.0
