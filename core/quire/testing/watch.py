"""What training looks like from beside: losses, gradients, and the weights after three steps."""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor

from quire.contracts import Losses

WINDOW = 8
FIRST = 3


class Watch(Callback):
    """Notes what each training step does.

    Args:
        only: Stop after this many steps; None stops when the loss has clearly fallen.
        disturb: Draw from all global random streams before each step, as a probe beside the run would.

    Attributes:
        losses: Weighted sum of the terms by step.
        terms: Each term by step.
        complaints: What is wrong with the objective's answers, by sentence.
        moved: Parameter → whether a gradient other than 0 has reached it.
        broken: Parameters whose gradient was not finite.
        weights: The weights after ``FIRST`` steps.
    """

    def __init__(self, only: int | None = None, disturb: bool = False) -> None:
        self.only, self.disturb = only, disturb
        self.losses: list[float] = []
        self.terms: dict[str, list[float]] = {}
        self.complaints: dict[str, None] = {}
        self.moved: dict[str, bool] = {}
        self.broken: dict[str, None] = {}
        self.weights: dict[str, Tensor] = {}
        self.players = False
        self._step: dict[str, float] = {}
        self._total = 0.0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Listen to the objective."""
        self.players = bool(pl_module.objective.players)
        self.moved = {n: False for n, p in pl_module.named_parameters() if p.requires_grad}
        self._handle = pl_module.objective.register_forward_hook(self._hear)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop listening."""
        self._handle.remove()

    def _hear(self, objective: Any, args: Any, losses: Any) -> None:
        for sentence in complaints(losses):
            self.complaints[f"{type(objective).__name__} {sentence}"] = None
        if isinstance(losses, dict):
            values = {k: float(v.detach().sum()) for k, v in losses.items() if isinstance(v, Tensor)}
            self._step.update(values)
            self._total += sum(objective.weights.get(k, 1.0) * v for k, v in values.items())

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A new step."""
        self._step, self._total = {}, 0.0
        if self.disturb:
            torch.rand(7)
            np.random.rand(7)
            for _ in range(7):
                random.random()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Look at the gradients of the first steps."""
        if len(self.losses) >= WINDOW:
            return
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is None or not parameter.requires_grad:
                continue
            size = parameter.grad.detach().abs().sum().item()
            if not math.isfinite(size):
                self.broken[name] = None
            elif size > 0:
                self.moved[name] = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the step; stop when there is nothing more to see."""
        self.losses.append(self._total)
        for name, value in self._step.items():
            self.terms.setdefault(name, []).append(value)
        if len(self.losses) == FIRST:
            state = pl_module.state_dict()
            self.weights = {k: v.detach().clone() for k, v in state.items() if isinstance(v, Tensor)}
        done = len(self.losses) >= self.only if self.only else len(self.losses) >= 2 * WINDOW and self.fell()
        trainer.should_stop = trainer.should_stop or done

    def fell(self) -> bool:
        """Whether the loss, or with several players one of its terms, is clearly lower than at first."""
        series = list(self.terms.values()) if self.players else [self.losses]
        return any(clearly_lower(s) for s in series)


def clearly_lower(values: list[float]) -> bool:
    """Whether the last few are below the first few by more than twice the standard error of that difference."""
    if len(values) < 2 * WINDOW:
        return False
    early, late = values[:WINDOW], values[-WINDOW:]
    error = math.sqrt((statistics.variance(early) + statistics.variance(late)) / WINDOW)
    return statistics.fmean(early) - statistics.fmean(late) > 2 * error


def complaints(losses: Any) -> list[str]:
    """What is wrong with an objective's answer."""
    if not isinstance(losses, Losses):
        return [f"returns a {type(losses).__name__}: return quire.Losses, its terms by name"]
    if not losses:
        return ["returns no terms"]
    said = []
    for name, value in losses.items():
        if not isinstance(value, Tensor):
            said.append(f"returns the term {name} as a {type(value).__name__}: return a scalar tensor")
        elif value.ndim or not value.is_floating_point():
            shape, kind = list(value.shape), str(value.dtype).removeprefix("torch.")
            said.append(f"returns the term {name} as {shape} {kind}: return a floating scalar")
        elif not value.requires_grad and torch.is_grad_enabled():
            said.append(f"returns the term {name} without a gradient: log it in Losses.metrics, or keep it attached")
    for name, given in losses.metrics.items():
        with torch.no_grad():
            number = given() if callable(given) else given
        if not isinstance(number, Tensor) or number.ndim:
            said.append(f"returns the metric {name} as {_kind(number)}: return a scalar tensor, or a function of one")
    return said


def _kind(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
