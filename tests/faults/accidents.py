"""Callbacks that end a run the hard way."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch


class Crash(RuntimeError):
    """Stands for a kill where the test's own process must live on."""


class Accident(pl.Callback):
    """End the run just before a training step: by SIGKILL, or by ``Crash`` when ``soft``."""

    def __init__(self, step: int, soft: bool = False) -> None:
        self.step, self.soft = step, soft

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            end(self.soft)


class AccidentWhileWriting(pl.Callback):
    """End the run when half of a checkpoint's bytes are written, at the first checkpoint after a step."""

    def __init__(self, step: int, soft: bool = False) -> None:
        self.step, self.soft = step, soft

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        if trainer.global_step < self.step:
            return
        save = torch.save

        def half(content: Any, target: Any, *args: Any, **kwargs: Any) -> None:
            torch.save = save
            whole = io.BytesIO()
            save(content, whole)
            handle = open(target, "wb") if isinstance(target, (str, Path)) else target  # noqa: SIM115
            handle.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            handle.flush()
            end(self.soft)

        torch.save = half


def end(soft: bool) -> None:
    """No clean-up, no exit handlers."""
    if soft:
        raise Crash
    os.kill(os.getpid(), signal.SIGKILL)
