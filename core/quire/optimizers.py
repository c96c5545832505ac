"""Optimizers and schedules of a model's players: parameter groups, layer-wise rates, and their plain description."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quire.contracts import Encoder
from quire.errors import ConfigError, suggest
from quire.recipe import instantiate
from quire.schedule import WarmupCosine

if TYPE_CHECKING:
    from quire.model import Model


def each(value: Any, change: Callable[[Any], Any]) -> Any:
    """``change`` applied to one value, or to each player's."""
    return {k: change(v) for k, v in value.items()} if isinstance(value, (dict, nn.ModuleDict)) else change(value)


def by_player(value: Any) -> bool:
    """Whether ``value`` has one entry a player; plain values of one thing have a ``class_path``."""
    return isinstance(value, dict) and "class_path" not in value


def schedule_from(given: Any) -> nn.Module:
    """A Schedule, or a ModuleDict of them by player, from components or plain values; default ``WarmupCosine``."""
    if by_player(given):
        return nn.ModuleDict(each(given, schedule_from))
    return instantiate(given) or WarmupCosine()


def of_player(value: Any, player: str, players: tuple[str, ...], key: str) -> Any:
    """One player's share of ``value``. Raises ``ConfigError`` when the players' names don't agree."""
    if not isinstance(value, (dict, nn.ModuleDict)):
        return value
    for name in value:
        if name not in players:
            known = ", ".join(p for p in players if p) or "none"
            raise ConfigError(
                f"model.{key} names the player {name}{suggest(name, list(players))}; the objective has {known}"
            )
    if player not in value:
        raise ConfigError(f"model.{key} has nothing for the player {player}: name every player, or give one for all")
    return value[player]


def configure(model: Model) -> Any:
    """One optimizer and schedule a player; weight decay only on matrices; layer-wise decay if asked for."""
    total = float(model.trainer.estimated_stepping_batches)
    players = tuple(model.objective.players) or ("",)
    made = []
    for player in players:
        make = of_player(model.optimizer, player, players, "optimizer")
        schedule = of_player(model.schedule, player, players, "schedule")
        parameters = model.objective.parameters_of(model, player) if player else model.parameters()
        grouped = groups(model, parameters, make)
        try:
            optimizer = make(grouped)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"model.optimizer: {error}") from error
        curve = functools.partial(schedule.factor, total=total)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, curve)
        made.append({"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}})
    return made if len(made) > 1 else made[0]


def groups(model: Model, parameters: Iterable[nn.Parameter], make: Any) -> list[dict[str, Any]]:
    """Parameter groups: no decay for norms, biases and scalars; lower rates for lower layers of a fine-tuned part."""
    wanted = {id(p) for p in parameters if p.requires_grad}
    if not wanted:
        raise ConfigError("nothing to train: every parameter is frozen or there are none")
    scales = layer_scales(model)
    rate = learning_rate(make) if scales else 0.0
    found: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if id(parameter) in wanted:
            found.setdefault((parameter.ndim > 1, scales.get(id(parameter), 1.0)), []).append(parameter)
    made: list[dict[str, Any]] = []
    for (decays, scale), members in found.items():
        group: dict[str, Any] = {"params": members}
        if not decays:
            group["weight_decay"] = 0.0
        if scale != 1.0:
            group["lr"] = rate * scale
        made.append(group)
    return made


def layer_scales(model: Model) -> dict[int, float]:
    """Factor on the learning rate by parameter id, from ``layer_decay`` of pretrained encoders."""
    scales: dict[int, float] = {}
    for part in model.components():
        decay = (part.__dict__.get("origin") or {}).get("layer_decay")
        if decay and isinstance(part, Encoder):
            layers = part.layers()
            for i, layer in enumerate(layers):
                scales.update({id(p): decay ** (len(layers) - i) for p in layer.parameters()})
    return scales


def optimizer_from(given: Any) -> Any:
    """A callable ``groups → Optimizer`` from None, a callable, or plain values of a checkpoint; by player too."""
    if by_player(given):
        return each(given, optimizer_from)
    if given is None:
        return functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05)
    if not isinstance(given, Mapping):
        return given
    module, _, name = given["class_path"].rpartition(".")
    holder = importlib.import_module(module) if module.startswith("torch.optim") else sys.modules.get(module)
    cls = getattr(holder, name, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ConfigError(f"the checkpoint's optimizer {given['class_path']} is not a known optimizer class")
    return functools.partial(cls, **given.get("init_args", {}))


def _optimizer_class(made: Any) -> type | None:
    for item in (getattr(made, "func", made), *getattr(made, "args", ())):
        if isinstance(item, type) and issubclass(item, torch.optim.Optimizer):
            return item
    return None


def optimizer_plain(made: Any) -> dict[str, Any] | None:
    """``{"class_path", "init_args"}`` of a partial optimizer; None when it is some other callable."""
    cls = _optimizer_class(made)
    if cls is None:
        return None
    arguments = {k: list(v) if isinstance(v, tuple) else v for k, v in getattr(made, "keywords", {}).items()}
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": arguments}


def learning_rate(made: Any) -> float:
    """The base learning rate of a partial optimizer, for layer-wise decay."""
    if "lr" in getattr(made, "keywords", {}):
        return float(made.keywords["lr"])
    cls = _optimizer_class(made)
    if cls is None:
        raise ConfigError("layer_decay needs model.optimizer given by class_path, to know its learning rate")
    return float(inspect.signature(cls).parameters["lr"].default)
