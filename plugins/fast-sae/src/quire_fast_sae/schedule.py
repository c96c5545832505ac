"""The paper's learning rate: warm up, hold, and fall along a cosine at the end."""

from __future__ import annotations

import math
from typing import Any

from quire.errors import ConfigError
from quire.roles.sparse.selector import tiny_run
from quire.schedule import Schedule


class HoldThenCosine(Schedule):
    """Linear warm-up, a constant rate, then half a cosine down to a floor over the last steps. Li, Ye et al. 2025.

    Args:
        warmup: Length of the warm-up: a share of all steps below 1, a number of steps from 1 on.
        decay: Length of the cosine at the end, counted likewise.
        floor: Factor at the end, in [0, 1].

    Raises:
        ConfigError: a negative length, ``floor`` outside [0, 1], or a run shorter than both lengths.
    """

    def __init__(self, warmup: float = 0.05, decay: float = 0.2, floor: float = 0.1) -> None:
        super().__init__()
        if min(warmup, decay) < 0 or not 0 <= floor <= 1:
            raise ConfigError(
                f"HoldThenCosine needs warmup and decay of at least 0 and floor in [0, 1], got {warmup}, {decay},"
                f" {floor}"
            )
        self.warmup, self.decay, self.floor = warmup, decay, floor

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small dictionary."""
        run = tiny_run({"class_path": "TopK", "init_args": {"k": 2}})
        run["model"]["schedule"] = cls.__name__
        return run

    def factor(self, step: int, total: float) -> float:
        """Factor at ``step`` of ``total``; 1 after the warm-up when there is no end."""
        rise, fall = (n if n >= 1 or math.isinf(total) else n * total for n in (self.warmup, self.decay))
        if step < rise:
            return (step + 1) / (rise + 1)
        if math.isinf(total):
            return 1.0
        if rise + fall > total:
            raise ConfigError(
                f"HoldThenCosine warms up for {rise:g} and falls for {fall:g} steps, but the run has {total:g}: give"
                " shares below 1"
            )
        done = max(0.0, min(1.0, (step - (total - fall)) / fall)) if fall else 0.0
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))
