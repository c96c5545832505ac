"""The table of components: short name → class path, kind, roles, plugin. No class is imported to fill it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from quire.errors import ConfigError, QuireError, suggest

KINDS = ("encoder", "decoder", "objective", "sampler", "data", "callback", "metric", "part")


@dataclass(frozen=True)
class Entry:
    """One registered component.

    Attributes:
        name: Class name, the short name in YAML.
        path: Full class path, ``package.module.ClassName``.
        kind: One of ``KINDS``.
        role: Roles it provides; for a part, the role it plays.
        plugin: Plugin that registered it, ``core`` for Quire's own.
    """

    name: str
    path: str
    kind: str
    role: tuple[str, ...]
    plugin: str

    @property
    def module(self) -> str:
        return self.path.rpartition(".")[0]

    def load(self) -> type:
        """Import the module and return the class. Raises ``ConfigError`` when that fails, naming the plugin."""
        try:
            return getattr(importlib.import_module(self.module), self.name)
        except QuireError:
            raise
        except Exception as error:  # a plugin's module can fail in any way
            raise ConfigError(
                f"{self.name} of plugin {self.plugin} can't be imported ({type(error).__name__}: {error}): "
                "reinstall the plugin; quire doctor checks all of them"
            ) from error

    def summary(self) -> str:
        """First line of the docstring."""
        return self.docstring().partition("\n")[0]

    def docstring(self) -> str:
        """The class's docstring, read from the source without importing it."""
        tree = _source(self.module)
        for node in tree.body if tree else ():
            if isinstance(node, ast.ClassDef) and node.name == self.name:
                return ast.get_docstring(node) or ""
        return ""


@dataclass
class Registry:
    """Entries by name. One name claimed twice is kept aside and refused only when it is used."""

    entries: dict[str, Entry] = field(default_factory=dict)
    clashes: dict[str, list[Entry]] = field(default_factory=dict)

    def add(self, path: str, kind: str, role: str | Iterable[str] = (), plugin: str = "core") -> None:
        """Add one component. Raises ``ConfigError`` for an unknown kind or a path without a module."""
        name = path.rpartition(".")[2]
        if kind not in KINDS:
            raise ConfigError(f"{path} has kind {kind!r}; kinds are {', '.join(KINDS)}")
        if "." not in path or ":" in path or not name.isidentifier():
            raise ConfigError(f"{path!r} is not a class path like package.module.ClassName")
        roles = (role,) if isinstance(role, str) else tuple(role)
        entry = Entry(name, path, kind, tuple(r for r in roles if r), plugin)
        old = self.entries.get(name)
        if old is not None and old.path != path:
            self.clashes.setdefault(name, [old]).append(entry)
        else:
            self.entries[name] = entry

    def remove(self, plugin: str) -> None:
        """Forget what a plugin registered, as if it had never been there."""
        kept = dict.fromkeys([*self.entries.values(), *(e for claims in self.clashes.values() for e in claims)])
        self.entries, self.clashes = {}, {}
        for entry in kept:
            if entry.plugin != plugin:
                self.add(entry.path, entry.kind, entry.role, entry.plugin)

    def __iter__(self) -> Iterator[Entry]:
        return iter(sorted(self.entries.values(), key=lambda e: (KINDS.index(e.kind), e.plugin != "core", e.name)))

    def get(self, name: str) -> Entry:
        """The entry of a short name. Raises ``ConfigError`` with the nearest names, or with both claimants."""
        if name in self.clashes:
            claims = " and ".join(f"{e.plugin} ({e.path})" for e in self.clashes[name])
            raise ConfigError(f"{name} is claimed by {claims}: write the full class path, or set QUIRE_PLUGINS")
        if name not in self.entries:
            near = suggest(name, list(self.entries)) or "; quire components lists them"
            raise ConfigError(f"no component is named {name}{near}")
        return self.entries[name]

    def by_path(self, path: str) -> Entry | None:
        """The entry whose class path is ``path``, or None."""
        for entry in (*self.entries.values(), *(e for c in self.clashes.values() for e in c)):
            if entry.path == path:
                return entry
        return None

    def providing(self, role: str, kind: str | None = None) -> list[str]:
        """Names of the components that declare ``role``, sorted."""
        return sorted(e.name for e in self.entries.values() if role in e.role and kind in (None, e.kind))

    def import_named(self, words: Iterable[str]) -> None:
        """Import the modules that own a short name or class path among ``words``; the rest is ignored."""
        for word in words:
            name = word.rpartition(".")[2]
            if word in self.clashes:
                self.get(word)
            entry = self.by_path(word) if "." in word else self.entries.get(name)
            if entry is not None:
                entry.load()


def _source(module: str) -> ast.Module | None:
    """The parsed source, found by path: importing a parent package could import torch."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.origin:
        return None
    place = Path(spec.origin).parent.joinpath(*rest)
    for file in (place.with_suffix(".py"), place / "__init__.py"):
        if file.is_file():
            return ast.parse(file.read_text(encoding="utf-8"))
    return None
