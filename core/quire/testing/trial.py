"""A component's tiny run, parsed as the command line would and run once for all the checks that look at it."""

from __future__ import annotations

import atexit
import copy
import functools
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from quire.cli import one_line
from quire.contracts import Batch, Component
from quire.data import DataModule
from quire.errors import ConfigError
from quire.model import Model
from quire.plugins import load
from quire.testing.offline import offline
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


@functools.lru_cache(maxsize=1)
def folder() -> Path:
    """A temporary folder of this process, removed when it ends."""
    made = Path(tempfile.mkdtemp(prefix="quire-kit-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@contextmanager
def working_in(place: Path) -> Iterator[None]:
    """Run in another working directory."""
    before = os.getcwd()
    place.mkdir(parents=True, exist_ok=True)
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def quietly() -> Iterator[list[str]]:
    """Without the network, Lightning's chatter and warnings, in a folder of its own; gives the hosts asked for."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), working_in(folder()), offline() as asked:
            warnings.simplefilter("ignore")
            yield asked
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


# ---- from a tiny run to objects
def words(value: Any) -> Iterator[str]:
    """Every string in nested dicts and lists."""
    if isinstance(value, dict):
        for item in value.values():
            yield from words(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from words(item)
    elif isinstance(value, str):
        yield value


class _Parser(LightningArgumentParser):
    said: frozenset[str] = frozenset()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError(one_line(message, set(self.said))) from ex


@functools.lru_cache(maxsize=1)
def _parser() -> _Parser:
    parser = _Parser()
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_lightning_class_args(Model, "model")
    parser.add_lightning_class_args(DataModule, "data", subclass_mode=True)
    parser.link_arguments("data.spec", "model.spec", apply_on="instantiate")
    return parser


@dataclass
class Made:
    """The objects of one run, new: nothing is trained."""

    model: Model
    data: DataModule
    callbacks: list[Callback]
    options: dict[str, Any]

    def components(self) -> Iterator[Any]:
        """Everything that YAML named: parts of the model, the data module and its parts, callbacks."""
        yield from self.model.components()
        yield self.data
        for value in vars(self.data).values():
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(item, nn.Module):
                    yield from (m for m in item.modules() if isinstance(m, Component))
        yield from self.callbacks

    def find(self, cls: type) -> Any:
        """The first component of exactly this class, or None; ``Pretrained`` stands for whatever it loaded."""
        for item in self.components():
            if type(item) is cls or (cls.__name__ == "Pretrained" and "origin" in vars(item)):
                return item
        return None


def parse(config: dict[str, Any]) -> Any:
    """A run in the YAML grammar, as the command line would understand it."""
    load().registry.import_named(words(config))
    parser = _parser()
    parser.said = frozenset(words(config))
    return parser.parse_object(copy.deepcopy(config))  # parsing writes into what it is given


def make(parsed: Any) -> Made:
    """The objects of a parsed run, with seed 0."""
    seed_everything(0, verbose=False)
    made = _parser().instantiate_classes(parsed)
    options = dict(made.trainer)
    callbacks = options.pop("callbacks") or []
    return Made(made.model, made.data, callbacks if isinstance(callbacks, list) else [callbacks], options)


def trainer_of(made: Made, callbacks: list[Callback], **options: Any) -> Trainer:
    """A quiet CPU trainer with the run's own options where the kit has none."""
    ours = {
        "accelerator": "cpu",
        "devices": 1,
        "strategy": "auto",
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": str(folder()),
        "log_every_n_steps": 1,
    }
    return Trainer(**{**made.options, **ours, "callbacks": callbacks, **options})


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


@contextmanager
def _temporary_files() -> Iterator[None]:
    before = tempfile.tempdir
    tempfile.tempdir = str(folder())  # what a tiny run needs goes when this process does
    try:
        yield
    finally:
        tempfile.tempdir = before


@functools.cache
def _tiny(cls: type) -> dict[str, Any]:
    declare = getattr(cls, "tiny", None)
    if declare is None:
        raise Fault(f"{cls.__name__} declares no tiny example: add a classmethod tiny()")
    try:
        with quietly(), _temporary_files():
            return declare()
    except ConfigError as error:
        raise Fault(str(error)) from error


def trial_of(cls: type) -> Trial:
    """The trial of a component's ``tiny()``. Raises ``Fault`` when it declares none."""
    config = _tiny(cls)
    if not isinstance(config, dict) or not {"model", "data"} <= set(config) <= {"model", "data", "trainer"}:
        raise Fault(f"{cls.__name__}.tiny() must return a dict with model, data and, if needed, trainer")
    return _TRIALS.setdefault(json.dumps(config, sort_keys=True, default=str), Trial(config))


def needed(step: Callable[[], T], what: str) -> T:
    """``step()``, or ``Skip`` when it fails: the check named ``what`` reports that."""
    try:
        return step()
    except Exception as error:
        raise Skip(f"not reached: see {what} ({type(error).__name__})") from error


def forget() -> None:
    """Drop every cached trial: plugins have changed."""
    _TRIALS.clear()
    _tiny.cache_clear()
