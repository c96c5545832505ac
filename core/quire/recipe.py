"""Components from plain values: the way back from what a checkpoint keeps."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from quire.contracts import Component, Spec, build
from quire.errors import ConfigError
from quire.plugins import load


def instantiate(what: Any) -> Any:
    """Build a component from ``{"class_path", "init_args"}``; a component passes through.

    Only classes that an installed plugin registered, or component classes already imported, are made: a
    checkpoint can't name a function to call.
    """
    if not isinstance(what, Mapping) or "class_path" not in what:
        if isinstance(what, (list, tuple)):
            return [instantiate(w) for w in what]
        return what
    cls = component_class(what["class_path"])
    arguments = {k: _instantiate_nested(v) for k, v in (what.get("init_args") or {}).items()}
    made = cls(**arguments)
    if what.get("pretrained"):
        adopt(made, dict(what["pretrained"]))
    return made


def _instantiate_nested(value: Any) -> Any:
    if isinstance(value, Mapping) and "class_path" in value:
        return instantiate(value)
    if isinstance(value, Mapping):
        return {k: _instantiate_nested(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_instantiate_nested(v) for v in value]
    return value


def component_class(path: str) -> type[Component]:
    """The component class of a path or short name. Raises ``ConfigError`` naming the missing plugin."""
    registry = load().registry
    entry = registry.by_path(path) if "." in path else registry.get(path)
    if entry is not None:
        return entry.load()
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    if isinstance(found, type) and issubclass(found, Component):
        return found
    package = module.partition(".")[0]
    need = f": pip install {package.replace('_', '-')}" if package.startswith("quire_") else ""
    raise ConfigError(f"the checkpoint needs {path}, which no installed plugin registers{need or ': import it first'}")


def adopt(part: Component, origin: dict[str, Any]) -> None:
    build(part, Spec(origin["spec"]))
    object.__setattr__(part, "origin", origin)
    part.frozen = bool(origin.get("freeze"))
    if part.frozen:
        part.requires_grad_(False).eval()
    else:
        part.train()  # a loaded model is in eval mode, and the trainer keeps the mode it finds
