"""From a run in the YAML grammar to its objects, by the same parser as the command line's."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn

from quire.contracts import Component
from quire.data import DataModule, expand
from quire.errors import ConfigError
from quire.model import Model
from quire.parse_errors import one_line
from quire.plugins import load
from quire.testing.quiet import folder
from quire.testing.verdict import Skip


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


def need_data(text: str) -> None:
    """Raise ``Skip`` when a YAML text reads a path under ``$QUIRE_DATA`` that does not exist here."""
    for path in re.findall(r"\$\{?QUIRE_DATA\}?(?:/[\w./-]+)?", re.sub(r"(?m)^\s*#.*$|\s#.*$", "", text)):
        if not expand(path).exists():
            raise Skip(f"needs {path}, which is not here: set QUIRE_DATA to a folder that has it")


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
        """The first component of exactly this class, or None; a loader (``Pretrained``) stands for what it loaded."""
        for item in self.components():
            if type(item) is cls or ("__new__" in vars(cls) and "origin" in vars(item)):
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
