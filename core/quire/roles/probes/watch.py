"""When something is measured in a run: on validation epochs, at the end of fit, in validate and test."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from quire.contracts import Encoder
from quire.data import DataModule
from quire.errors import ConfigError
from quire.matching import refusal
from quire.roles.probes.subject import Subject, check_reads, untouched


class Watch(Callback):
    """Base of probes and health: decides when, guards the run, logs. Subclass it and write ``measure`` and ``show``.

    Attributes:
        encoder: The role it needs of ``model.encoder``.
        fields: Batch fields it reads beside the encoder's.
        prefix: What its numbers are called in the log, after ``val/`` or ``test/``.
    """

    encoder: Encoder
    fields: ClassVar[tuple[str, ...]] = ()
    prefix: str

    def __init__(self, prefix: str, every: int) -> None:
        super().__init__()
        if every < 0:
            raise ConfigError(f"{type(self).__name__}.every must be at least 0 (0: only at the end), got {every}")
        self.prefix, self.every = prefix, every
        self._epoch, self._step = -1, -1  # when it was last measured

    # ---- what a subclass writes
    def measure(self, subject: Subject, split: str, epoch: int = 0, step: int = 0) -> dict[str, float]:
        """Numbers by the end of their name in the log; ``""`` is the main one."""
        raise NotImplementedError

    def fits(self, encoder: Encoder) -> None:
        """Raise ``ConfigError`` when it can't judge this encoder, which is built and has its sizes."""

    def extra(self, trainer: Trainer, model: Any, split: str) -> dict[str, float]:
        """Numbers that need the running trainer."""
        return {}

    def show(self, folder: Path) -> str:
        """Write what was measured to files in ``folder``; returns what to print."""
        raise NotImplementedError

    # ---- Lightning
    @property
    def state_key(self) -> str:
        """Two of one class are told apart by their name in the log."""
        return f"{type(self).__qualname__}[{self.prefix}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a model or data that it can't judge, before anything runs."""
        if stage == "predict":
            return
        source = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(source, DataModule):
            raise ConfigError(f"{type(self).__name__} reads whole splits: give data as a Quire data module")
        said = refusal(type(self), "encoder", pl_module.encoder)  # type: ignore[arg-type]
        if said:
            raise ConfigError(said)
        check_reads(pl_module.encoder, source.offered(), type(source).__name__, self.fields, self)  # type: ignore[arg-type]
        self._epoch, self._step = -1, -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse sizes that it can't judge."""
        self.fits(pl_module.encoder)  # type: ignore[arg-type]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse sizes that it can't judge."""
        self.fits(pl_module.encoder)  # type: ignore[arg-type]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse sizes that it can't judge."""
        self.fits(pl_module.encoder)  # type: ignore[arg-type]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure on the val split when it is due."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn != "fit":
            self._log_epoch(trainer, pl_module, "val")
            self._finish(trainer)
        elif self._due(trainer):
            self._log_epoch(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure on the test split."""
        self._log_epoch(trainer, pl_module, "test")
        self._finish(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the weights that training ended with, unless the last validation did; then show everything."""
        if self._step != trainer.global_step:
            values = self._values(trainer, pl_module, "val")
            trainer.callback_metrics.update({k: torch.tensor(v) for k, v in values.items()})
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)
        self._finish(trainer)

    def state_dict(self) -> dict[str, Any]:
        """When it was last measured, so a resumed run keeps the rhythm."""
        return {"epoch": self._epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the rhythm."""
        self._epoch = state_dict["epoch"]

    # ---- inside
    def _due(self, trainer: Trainer) -> bool:
        epoch = trainer.current_epoch
        last = trainer.max_epochs is not None and epoch + 1 == trainer.max_epochs
        return last or (self.every > 0 and (epoch == self._epoch or epoch - self._epoch >= self.every))

    def _values(self, trainer: Trainer, model: Any, split: str) -> dict[str, float]:
        self._epoch, self._step = trainer.current_epoch, trainer.global_step
        with untouched(model, model.device):
            found = self.measure(Subject.of(trainer, model), split, self._epoch, self._step)
        found |= self.extra(trainer, model, split)
        return {f"{split}/{self.prefix}{key}": value for key, value in found.items()}

    def _log_epoch(self, trainer: Trainer, model: LightningModule, split: str) -> None:
        values = self._values(trainer, model, split)
        model.log_dict(values, on_epoch=True, batch_size=1, sync_dist=trainer.world_size > 1)

    def _finish(self, trainer: Trainer) -> None:
        folder = Path(trainer.log_dir or ".")  # asked on every rank: it waits for rank 0
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            print(self.show(folder))
