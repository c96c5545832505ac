"""What was trained comes back the same: from a checkpoint without YAML, and from safetensors."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quire
from quire.errors import QuireError
from quire.model import Model
from quire.testing.quiet import folder, quietly
from quire.testing.subject import Subject
from quire.testing.trial import Ran, copied, needed
from quire.testing.verdict import Fault


def reloads(subject: Subject) -> None:
    """A checkpoint, loaded without the YAML, has the same weights and gives the same answers."""
    ran = needed(lambda: subject.trial.ran(), "trains")
    with _place() as place, quietly():
        file = place / "model.ckpt"
        ran.trainer.save_checkpoint(file)
        try:
            loaded = quire.load(file)
        except (QuireError, RuntimeError, TypeError) as error:
            raise Fault(f"its checkpoint can't be loaded without the YAML: {error}") from error
        _compare(ran, loaded, "loaded from its checkpoint")


def exports(subject: Subject) -> None:
    """The same through ``quire.export``: safetensors and JSON."""
    ran = needed(lambda: subject.trial.ran(), "trains")
    with _place() as place, quietly():
        try:
            quire.export(ran.made.model, place / "export")
            loaded = quire.load(place / "export")
        except (QuireError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise Fault(f"it can't be exported as safetensors and loaded again: {error}") from error
        _compare(ran, loaded, "loaded from its export")


class _place:
    def __enter__(self) -> Path:
        self.path = Path(tempfile.mkdtemp(dir=folder()))
        return self.path

    def __exit__(self, *_: Any) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _compare(ran: Ran, loaded: Model, how: str) -> None:
    model = ran.made.model
    before, after = model.state_dict(), loaded.state_dict()
    for name in before:
        if isinstance(before[name], Tensor) and not same(before[name].cpu(), after[name].cpu()):
            raise Fault(f"{how}, the weight {name} differs")
    expected, found = answers(model, ran), answers(loaded, ran)
    for what, value in expected.items():
        if what not in found or not same(value, found[what]):
            raise Fault(
                f"{how}, the model's {what} differs though its weights are the same: keep what it needs in "
                "parameters, buffers or __init__ arguments"
            )


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, not-a-number included."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
    return type(a) is type(b) and (a == b or (a != a and b != b))


def answers(model: Model, ran: Ran) -> dict[str, Any]:
    """Codes, losses and samples of the run's batch, from the same random numbers each time."""
    model.trainer = ran.trainer  # so that both see the same step, data module and subject
    model.eval()
    found: dict[str, Any] = {}
    for what, ask in _questions(model).items():
        model._rekey("val", 0, 0)
        found |= dict(leaves(ask(copied(ran.batch)), what))
    return found


def _questions(model: Model) -> dict[str, Any]:
    asked: dict[str, Any] = {}
    if model.encoder is not None:
        asked["codes"] = lambda batch: _without_grad(model.encoder, batch)
    if model.objective is not None:
        for player in model.objective.players or ("",):
            given = {"player": player} if player else {}
            asked["loss"] = lambda batch, given=given: dict(model.objective(model, batch, **given))
    if model.sampler is not None:
        asked["samples"] = lambda batch: (
            model.sampler(model, batch) if model.sampler.needs_grad else _without_grad(model.sampler, model, batch)
        )
    return asked


def _without_grad(call: Any, *args: Any) -> Any:
    with torch.no_grad():
        return call(*args)


def leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Tensors and plain values inside dicts, lists and dataclasses, by their place."""
    if isinstance(value, Tensor):
        yield where, value.detach()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from leaves(item, f"{where}[{i}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in (f for f in dataclasses.fields(value) if f.compare):  # times differ from run to run
            yield from leaves(getattr(value, item.name), f"{where}.{item.name}")
    else:
        yield where, value
