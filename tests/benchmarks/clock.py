"""CPU time of arms that take turns, so that a loaded machine slows them alike. Medians and minima, never a verdict."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch

Arms = dict[str, list[float]]


def race(arms: dict[str, Callable[[], Any]], repeats: int = 5, warmup: int = 2) -> Arms:
    """CPU seconds of each arm: ``repeats`` rounds after ``warmup`` ones, the arms in turn within a round."""
    spent: Arms = {name: [] for name in arms}
    for turn in range(warmup + repeats):
        for name, arm in arms.items():
            start = time.process_time()
            arm()
            if turn >= warmup:
                spent[name].append(time.process_time() - start)
    return spent


class Beside(pl.Callback):
    """Runs a step of another loop before each step of a fit, and times both.

    A fit's step is everything from the start of one batch to the start of the next: the model, the trainer,
    callbacks, logging and fetching the next batch.
    """

    def __init__(self, other: Callable[[], Any], warmup: int = 2) -> None:
        self.other, self.warmup = other, warmup
        self.spent: Arms = {"other": [], "fit": []}
        self._since: float | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now = time.process_time()
        if self._since is not None:
            self.spent["fit"].append(now - self._since)
        self.other()
        self._since = time.process_time()
        self.spent["other"].append(self._since - now)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._since = None  # what lies between epochs belongs to no step

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.spent = {name: times[self.warmup :] for name, times in self.spent.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """All of torch on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine() -> str:
    """What the numbers were taken on."""
    import lightning

    load = " ".join(f"{x:.1f}" for x in os.getloadavg())
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, load {load}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}"
    )


def milliseconds(times: list[float]) -> str:
    """``median (minimum)``."""
    return f"{1e3 * median(times):.1f} ({1e3 * min(times):.1f})"


def more_milliseconds(above: list[float], below: list[float]) -> str:
    """Difference of the medians, and of the minima in brackets."""
    return f"{1e3 * (median(above) - median(below)):.1f} ({1e3 * (min(above) - min(below)):.1f})"


def ratio(above: list[float], below: list[float]) -> str:
    """Of the medians, and of the minima in brackets."""
    return f"{median(above) / median(below):.3f} ({min(above) / min(below):.3f})"


def table(title: str, rows: list[list[str]]) -> None:
    """Print a title and rows of equally many columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(f"\n{title}")
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip(), flush=True)
