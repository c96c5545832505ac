"""The plugin as a package: it loads, keeps public classes findable, and knows no other plugin."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from quire.plugins import load
from quire.testing.verdict import Fault


def loads(plugin: str) -> None:
    """It was found and registered without an error, and no name of it is claimed by another plugin."""
    found = load()
    record = found.records[plugin]
    if record.error:
        raise Fault(f"{plugin} does not load: {record.error}")
    for name, entries in found.registry.clashes.items():
        if plugin in {e.plugin for e in entries}:
            others = ", ".join(sorted({e.plugin for e in entries} - {plugin})) or "itself twice"
            raise Fault(f"the name {name} is also claimed by {others}: rename the class")


def private_modules(plugin: str) -> None:
    """No public class lies in a ``_private`` module: YAML could not find it by its short name."""
    for file in _files(plugin):
        private = [p for p in file.relative_to(_origin(plugin).parent).with_suffix("").parts if _is_private(p)]
        if not private:
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                raise Fault(f"{node.name} is public in the private {file.name}: rename the file or the class")


def _is_private(part: str) -> bool:
    return part.startswith("_") and not part.startswith("__")


def other_plugins(plugin: str) -> None:
    """It imports no other plugin: what two share belongs in the core's roles, or a package of its own."""
    others = {r.module.partition(".")[0]: r.name for r in load().records.values()}
    for own in (_top(plugin), "quire"):
        others.pop(own, None)
    for file in _files(plugin):
        for module in _imports(ast.parse(file.read_text(encoding="utf-8"))):
            if module in others:
                raise Fault(f"{file.name} imports {module}, the plugin {others[module]}: a plugin stands alone")


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def _top(plugin: str) -> str:
    return load().records[plugin].module.partition(".")[0]


def _origin(plugin: str) -> Path:
    spec = importlib.util.find_spec(_top(plugin))
    assert spec is not None and spec.origin is not None  # it was imported
    return Path(spec.origin)


def _files(plugin: str) -> list[Path]:
    origin = _origin(plugin)
    return sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
