"""What shipped pretraining runs spend beside their steps: waiting for data, and Health."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tests.benchmarks.clock import table
from tests.benchmarks.loop import quiet

WHOLE = ("mp3/digits", "mp3/speech_tones", "cae/digits", "multimae/digits", "multimae/shapes")
FILES = ("mp3/fsdd", "cae/kodak", "multimae/stereo")
STEPS = 60
"""Steps of a run that reads files; the others run as they are shipped."""


class Spent:
    """Wall and CPU seconds inside some functions."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*given: Any, **more: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                return function(*given, **more)
            finally:
                self.wall += time.perf_counter() - wall
                self.cpu += time.process_time() - cpu

        return timed


@contextlib.contextmanager
def timing(cls: type, names: tuple[str, ...]) -> Iterator[Spent]:
    """Time methods of a class."""
    spent = Spent()
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(cls, name, spent.of(getattr(cls, name))))
        yield spent


def run(name: str, more: list[str]) -> list[str] | None:
    """A row: wall seconds in fit, the share of it that waited for a batch, and Health's share of the CPU time."""
    from lightning.pytorch.loops import fetchers
    from lightning.pytorch.trainer.trainer import Trainer

    from quire.__main__ import execute
    from quire.roles.probes.health import Health

    hooks = ("on_before_optimizer_step", "on_validation_epoch_end", "on_train_end")
    quietly = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    before = Path.cwd()
    with (
        tempfile.TemporaryDirectory() as folder,
        timing(Trainer, ("fit",)) as fit,
        timing(fetchers._PrefetchDataFetcher, ("__next__",)) as data,
        timing(Health, hooks) as health,
        quiet(),
    ):
        os.chdir(folder)
        try:
            code = execute(["fit", "-c", name, "--trainer.accelerator=cpu", *quietly, *more])
        finally:
            os.chdir(before)
    if code:
        return None
    return [name, f"{fit.wall:.1f}", f"{100 * data.wall / fit.wall:.1f} %", f"{100 * health.cpu / fit.cpu:.1f} %"]


def main() -> None:
    """Print the table."""
    rows = [["", "fit, s", "waits for data", "Health, of CPU time"]]
    for name in WHOLE:
        rows.append(run(name, []) or [name, "not installed", "", ""])
    for name in FILES:
        found = run(name, [f"--trainer.max_steps={STEPS}", f"--trainer.val_check_interval={STEPS}"])
        rows.append([*found[:3], f"{found[3]} (of {STEPS} steps)"] if found else [name, "no data", "", ""])
    table(f"Shipped pretraining runs, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads", rows)


if __name__ == "__main__":
    main()
