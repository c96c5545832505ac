"""The paper's learning rate: a cosine rise at the start and after each resampling (arXiv 2406.17759)."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback

from quire.errors import ConfigError
from quire.roles.sparse.resample import Resample
from quire.schedule import Schedule
from quire_attn_sae.runs import tiny_run


class CosineWarmupRewarm(Schedule):
    """From a share of the learning rate up to all of it by a cosine, then constant; again after each resampling.

    Kissane, Krzyzanowski et al. 2024, as in the official code. Resamplings are those of the run's ``Resample``; without
    one there is a single rise.

    Args:
        start: Factor at the first step, in [0, 1].
        steps: Steps from there to 1.

    Raises:
        ConfigError: ``start`` outside [0, 1], or ``steps`` below 1.
    """

    def __init__(self, start: float = 0.1, steps: int = 1000) -> None:
        super().__init__()
        if not 0 <= start <= 1 or steps < 1:
            raise ConfigError(f"CosineWarmupRewarm needs start in [0, 1] and steps >= 1, got {start} and {steps}")
        self.start, self.steps = start, steps
        self.again: list[int] = []  # steps at which the rise began anew

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small dictionary, resampled after two steps."""
        run = tiny_run(schedule={"class_path": "CosineWarmupRewarm", "init_args": {"steps": 2}})
        return {**run, "trainer": {"callbacks": [{"class_path": "Resample", "init_args": {"every": 2}}]}}

    def factor(self, step: int, total: float) -> float:
        """Factor at ``step``: ``start`` where a rise begins, 1 from ``steps`` later on."""
        since = step - max([s for s in self.again if s <= step], default=0)
        if since >= self.steps:
            return 1.0
        return self.start + (1 - self.start) * 0.5 * (1 - math.cos(math.pi * since / self.steps))

    def callbacks(self) -> list[Callback]:
        """What tells it of resamplings."""
        return [Rewarm(self)]


class Rewarm(Callback):
    """Sets the rate of the step that follows a resampling, which was chosen before it."""

    def __init__(self, schedule: CosineWarmupRewarm) -> None:
        self.schedule = schedule

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """A resumed run has resampled before."""
        self.schedule.again = []
        self._follow(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Look whether the last step resampled."""
        self._follow(trainer)

    def _follow(self, trainer: Any) -> None:
        found = [s for c in trainer.callbacks if isinstance(c, Resample) for s in c.steps]
        if found == self.schedule.again:
            return
        self.schedule.again = found
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            rates = [b * f(scheduler.last_epoch) for b, f in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
            for group, rate in zip(scheduler.optimizer.param_groups, rates):
                group["lr"] = rate
            scheduler._last_lr = rates
