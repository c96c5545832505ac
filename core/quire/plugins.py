"""Discovery of installed plugins. A broken one is recorded and blocked; the others go on."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from quire import hooks
from quire.errors import ConfigError
from quire.registry import Registry


@dataclass
class Record:
    """What is known of one plugin: ``error`` is None when it works."""

    name: str
    distribution: str
    version: str
    module: str
    error: str | None = None


@dataclass
class Plugins:
    """Everything installed: plugin records, the component registry, commands and claims."""

    manager: pluggy.PluginManager
    records: dict[str, Record] = field(default_factory=dict)
    registry: Registry = field(default_factory=Registry)
    commands: dict[str, tuple[str, str, str]] = field(default_factory=dict)  # name → path, help, plugin
    claims: dict[str, tuple[str, str]] = field(default_factory=dict)  # name → path, plugin

    def configs(self) -> dict[str, Path]:
        """``plugin/name`` → the YAML file shipped in that plugin's package folder ``configs``."""
        found: dict[str, Path] = {}
        for record in self.records.values():
            if record.error is None and record.name != "core":
                folder = _package_folder(record.module) / "configs"
                found |= {f"{record.name}/{p.stem}": p for p in sorted(folder.glob("*.yaml"))}
        return found


def tracing() -> bool:
    """Whether ``QUIRE_TRACE`` asks for full tracebacks."""
    return os.environ.get("QUIRE_TRACE", "") not in ("", "0")


def _wanted() -> set[str] | None:
    names = os.environ.get("QUIRE_PLUGINS")
    return None if names is None else {n.strip() for n in names.split(",") if n.strip()}


@lru_cache(maxsize=1)
def load() -> Plugins:
    """Find and register every plugin once. ``QUIRE_PLUGINS=mp3,gsae`` loads only these; empty loads none."""
    found = Plugins(pluggy.PluginManager("quire"))
    found.manager.add_hookspecs(hooks)
    _guarded(found, Record("core", "quire", _version("quire"), "quire.builtin"), None)
    wanted = _wanted()
    for point in sorted(entry_points(group="quire"), key=lambda p: p.name):
        if wanted is not None and point.name not in wanted:
            continue
        dist = point.dist
        record = Record(point.name, dist.name if dist else "?", dist.version if dist else "?", point.value)
        if point.name in found.records:
            other = found.records[point.name].distribution
            record.error = f"the name {point.name} is already taken by {other}: uninstall one of them"
            found.records[f"{point.name} ({record.distribution})"] = record
        else:
            _guarded(found, record, point)
    return found


def _guarded(found: Plugins, record: Record, point: EntryPoint | None) -> None:
    found.records[record.name] = record
    try:
        _register(found, record, point.load() if point else importlib.import_module(record.module))
    except (Exception, SystemExit) as error:  # a plugin can fail in any way; the others must go on
        if tracing() or record.name == "core":
            raise
        found.manager.set_blocked(record.name)
        found.registry.remove(record.name)
        found.commands = {n: c for n, c in found.commands.items() if c[2] != record.name}
        found.claims = {n: c for n, c in found.claims.items() if c[1] != record.name}
        said = " ".join(str(error).split())
        record.error = f"{type(error).__name__}: {said if len(said) <= 240 else said[:237] + '...'}"


def _register(found: Plugins, record: Record, module: ModuleType) -> None:
    api = getattr(module, "QUIRE_API", hooks.API)
    if api != hooks.API:
        raise ConfigError(f"built for plugin interface {api}, this Quire has {hooks.API}: install a matching version")
    found.manager.register(module, name=record.name)
    found.manager.check_pending()

    def claim(kind: str, held: dict[str, Any], name: str, value: tuple[str, ...]) -> None:
        if name in held:
            raise ConfigError(f"the {kind} {name} is already registered by {held[name][-1]}")
        held[name] = (*value, record.name)

    table: dict[str, Callable] = {
        "quire_components": lambda path, kind, role=(): found.registry.add(path, kind, role, record.name),
        "quire_commands": lambda name, path, help="": claim("command", found.commands, name, (path, help)),
        "quire_claims": lambda name, path: claim("claim", found.claims, name, (path,)),
    }
    for caller in found.manager.get_hookcallers(found.manager.get_plugin(record.name)) or ():
        for implementation in caller.get_hookimpls():
            if implementation.plugin_name == record.name and caller.name in table:
                implementation.function(register=table[caller.name])


def _package_folder(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return Path()
    return Path(spec.origin).parent


def _version(distribution: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return "?"


def load_object(path: str) -> Callable:
    """Import ``package.module.attribute``."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
