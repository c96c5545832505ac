"""A component's tiny run, run once for all the checks that look at it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from quire.contracts import Batch
from quire.data import DataModule
from quire.errors import ConfigError
from quire.testing.assembly import Made, make, need_data, parse, trainer_of, words
from quire.testing.quiet import folder, quietly, temporary_files
from quire.testing.verdict import Fault, Skip
from quire.testing.watch import Watch

STEPS = 120
"""Most steps on one batch that the kit trains for; it stops as soon as the loss has clearly fallen."""

T = TypeVar("T")


def once(method: Callable[[Any], T]) -> Callable[[Any], T]:
    """The method's result, or its exception, computed once per object."""

    @functools.wraps(method)
    def call(self: Any) -> T:
        kept = self.__dict__.setdefault("_kept", {})
        if method.__name__ not in kept:
            try:
                kept[method.__name__] = (method(self), None)
            except Exception as error:  # told to every check that asks
                kept[method.__name__] = (None, error)
        value, failed = kept[method.__name__]
        if failed is not None:
            raise failed
        return value

    return call


class _Again:
    """One batch, many times; a fresh copy each, so a step that writes into its batch shows."""

    def __init__(self, batch: Batch, times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.times):
            yield copied(self.batch)


def copied(batch: Batch) -> Batch:
    """The batch with tensors of its own."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()}


def first_batch(data: DataModule) -> Batch:
    """The first training batch."""
    return next(iter(data.train_dataloader()))


@dataclass
class Ran:
    """What a short run as the user would make it left behind."""

    made: Made
    trainer: Trainer
    batch: Batch
    asked: list[str] = field(default_factory=list)
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Trial:
    """One tiny run; components that declare the same one share it."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    @once
    def parsed(self) -> Any:
        """The run, parsed; the same for every object made from it."""
        with quietly():
            return parse(self.config)

    @once
    def made(self) -> Made:
        """Built but not trained."""
        with quietly():
            made = make(self.parsed())
            made.model.configure_model()
            made.model.eval()
        return made

    @once
    def spare(self) -> Made:
        """Another one, built, that a check may change."""
        with quietly():
            made = make(self.parsed())
            made.model.configure_model()
        return made

    @once
    def ran(self) -> Ran:
        """Three training steps, validation, and the run's own callbacks."""
        with quietly() as asked:
            made = make(self.parsed())
            options = {"max_epochs": 1, "max_steps": -1, "limit_train_batches": 3, "limit_val_batches": 2}
            trainer = trainer_of(made, made.callbacks, logger=CSVLogger(str(folder()), name="kit"), **options)
            trainer.fit(made.model, datamodule=made.data)
            metrics = dict(trainer.callback_metrics)
            batch = made.data.transform(first_batch(made.data), made.model.generator("cpu"), training=False)
            return Ran(made, trainer, batch, asked, metrics)

    @once
    def learned(self) -> Watch:
        """Training on one batch until the loss has fallen."""
        return self._watch(Watch())

    @once
    def again(self) -> Watch:
        """The first three steps once more, with everybody's random streams disturbed between steps."""
        return self._watch(Watch(only=3, disturb=True))

    def _watch(self, watch: Watch) -> Watch:
        with quietly():
            made = make(self.parsed())
            original = made.data.train_dataloader
            made.data.train_dataloader = lambda: _Again(next(iter(original())), STEPS)  # type: ignore[method-assign, assignment, return-value]
            options = {"max_epochs": 1, "max_steps": STEPS, "limit_val_batches": 0, "logger": False}
            trainer = trainer_of(made, [watch], **options)
            trainer.fit(made.model, datamodule=made.data)
        return watch

    @once
    def predicted(self) -> Any:
        """What ``predict`` gives for one batch of the model that ``ran``, and the number of samples in it."""
        ran = self.ran()
        with quietly():
            trainer = trainer_of(ran.made, [], logger=False, limit_predict_batches=1)
            results = trainer.predict(ran.made.model, datamodule=ran.made.data)
            return results, size_of(next(iter(ran.made.data.predict_dataloader())))


def size_of(batch: Batch) -> int:
    """Number of samples."""
    return next(len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim)


_TRIALS: dict[str, Trial] = {}


@functools.cache
def tiny_of(cls: type) -> dict[str, Any]:
    declare = getattr(cls, "tiny", None)
    if declare is None:
        raise Fault(f"{cls.__name__} declares no tiny example: add a classmethod tiny()")
    try:
        with quietly(), temporary_files():
            return declare()
    except ConfigError as error:
        raise Fault(str(error)) from error


def trial_of(cls: type) -> Trial:
    """The trial of a component's ``tiny()``.

    Raises:
        Fault: it declares none.
        Skip: it reads a file under ``$QUIRE_DATA`` that is not here.
    """
    config = tiny_of(cls)
    if not isinstance(config, dict) or not {"model", "data"} <= set(config) <= {"model", "data", "trainer"}:
        raise Fault(f"{cls.__name__}.tiny() must return a dict with model, data and, if needed, trainer")
    for word in words(config):
        need_data(word)
    return _TRIALS.setdefault(json.dumps(config, sort_keys=True, default=str), Trial(config))


def needed(step: Callable[[], T], what: str) -> T:
    """``step()``, or ``Skip`` when it fails: the check named ``what`` reports that."""
    try:
        return step()
    except Skip:
        raise
    except Exception as error:
        raise Skip(f"not reached: see {what} ({type(error).__name__})") from error


def forget() -> None:
    """Drop every cached trial: plugins have changed."""
    _TRIALS.clear()
    tiny_of.cache_clear()
