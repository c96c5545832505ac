"""The never-rules of the house, each a function from a source tree to sentences that name file and line.

A tree has the repository's shape: ``core/quire`` and ``plugins/<name>/{src,tests}``. A rule reads files only, so a
small fake tree can show that it sees what it forbids.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

HEAVY = ("transformers", "timm", "torchvision", "soundfile", "diffusers", "av", "skimage")
AT_TOP = (("core/quire/roles/tokens/", "timm"), ("core/quire/roles/language/hf", "transformers"))
NETWORK_MODULES = ("requests", "httpx", "aiohttp", "urllib3", "urllib.request", "http.client", "huggingface_hub")
NETWORK_CALLS = ("urlopen", "urlretrieve", "snapshot_download", "hf_hub_download", "from_pretrained", "load_dataset")
REGISTERING = ("register", "add_hookspecs", "register_module")
VAGUE = re.compile(r"^_?(utils?|helpers?|common|misc|base2)$")
MACHINE_PATH = re.compile(r"(?<![\w.$}~-])/(?:home|root|Users|work|mnt)/\w|\b[A-Z]:\\\\?Users")
REGISTRY_HOST = re.compile(r"index[-]url|python[h]osted\.org|\bpypi\.(?:org|python)|[a]rtifactory|\bnexus\.")
TEXT = (".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".cfg", ".sh", "")
LONGEST, USUAL = 400, 300


# ---- reading a tree
def python_files(folder: Path) -> list[Path]:
    """Python files under ``folder``, sorted; what a template renders is not part of the program."""
    return sorted(p for p in folder.rglob("*.py") if not {"__pycache__", "template", ".venv"} & set(p.parts))


def core_files(root: Path) -> list[Path]:
    """The core package."""
    return python_files(root / "core" / "quire")


def plugin_sources(root: Path) -> dict[str, list[Path]]:
    """Plugin folder name → the files of its package."""
    return {p.name: python_files(p / "src") for p in sorted((root / "plugins").glob("*")) if p.is_dir()}


def parse(file: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def place(root: Path, file: Path, node: ast.AST | None = None) -> str:
    """``file:line`` as seen from the root."""
    line = f":{node.lineno}" if node is not None and hasattr(node, "lineno") else ""
    return f"{file.relative_to(root).as_posix()}{line}"


def imported(node: ast.AST) -> list[str]:
    """Modules that a node imports, dotted; ``from a import b`` gives ``a`` and ``a.b``; relative ones are left out."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level and node.module:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    if isinstance(node, ast.Call) and called(node) in ("import_module", "__import__") and node.args:
        first = node.args[0]
        return [first.value] if isinstance(first, ast.Constant) and isinstance(first.value, str) else []
    return []


def called(node: ast.Call) -> str:
    """The last name of what is called: ``a.b.c()`` → ``c``."""
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: everything but function bodies and ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for part in (*child.decorator_list, child.args):
                yield part
                yield from at_import(part)
        elif isinstance(child, ast.If) and _type_checking(child.test):
            for part in child.orelse:
                yield part
                yield from at_import(part)
        elif not isinstance(child, ast.Lambda):
            yield child
            yield from at_import(child)


def _type_checking(test: ast.expr) -> bool:
    return getattr(test, "id", getattr(test, "attr", "")) == "TYPE_CHECKING"


def _is(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


# ---- the rules
def core_imports_no_plugin(root: Path) -> list[str]:
    """Core never imports a plugin, not even inside a function."""
    found = []
    for file in core_files(root):
        for node in ast.walk(parse(file)):
            for module in imported(node):
                if module.startswith("quire_"):
                    found.append(f"{place(root, file, node)} imports the plugin package {module}: core knows no plugin")
    return found


def plugin_imports_no_plugin(root: Path) -> list[str]:
    """A plugin, its tests included, never imports another plugin; what two share moves to ``quire.roles``."""
    found = []
    for name, sources in plugin_sources(root).items():
        own = f"quire_{name.replace('-', '_')}"
        for file in (*sources, *python_files(root / "plugins" / name / "tests")):
            for node in ast.walk(parse(file)):
                for module in imported(node):
                    if module.startswith("quire_") and not _is(module, (own,)):
                        found.append(f"{place(root, file, node)} imports {module}: move what is shared to quire.roles")
    return found


def nothing_happens_at_import(root: Path) -> list[str]:
    """No network and no registration while a module of core or of a plugin is imported."""
    found = []
    for file in (*core_files(root), *(f for files in plugin_sources(root).values() for f in files)):
        for node in at_import(parse(file)):
            for module in imported(node):
                if _is(module, NETWORK_MODULES):
                    found.append(
                        f"{place(root, file, node)} imports {module} at module level: import it where it is used"
                    )
            if isinstance(node, ast.Call) and called(node) in NETWORK_CALLS:
                found.append(f"{place(root, file, node)} calls {called(node)} at import: move it into a function")
            if isinstance(node, ast.Call) and called(node) in REGISTERING:
                found.append(f"{place(root, file, node)} registers at import: do it in a hook implementation")
    return found


def plugin_init_holds_hooks(root: Path) -> list[str]:
    """A plugin's ``__init__`` holds hook implementations and plain constants, and imports nothing but ``quire``."""
    found = []
    for name in plugin_sources(root):
        file = root / "plugins" / name / "src" / f"quire_{name.replace('-', '_')}" / "__init__.py"
        if not file.is_file():
            found.append(f"plugins/{name} has no src/quire_{name.replace('-', '_')}/__init__.py")
            continue
        tree = parse(file)
        for node in ast.walk(tree):
            for module in imported(node):
                if module.partition(".")[0] not in ("__future__", "collections", "typing", "quire"):
                    found.append(
                        f"{place(root, file, node)} imports {module}: hooks name paths, classes are imported later"
                    )
                elif module.startswith("quire.") and not _is(module, ("quire.hooks", "quire.hookimpl")):
                    found.append(
                        f"{place(root, file, node)} imports {module}, which may need torch: import quire.hooks only"
                    )
        for statement in tree.body:
            if isinstance(statement, ast.FunctionDef):
                if not any("hookimpl" in ast.unparse(d) for d in statement.decorator_list):
                    found.append(f"{place(root, file, statement)} {statement.name} is no hook: move it")
            elif not isinstance(statement, (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)) and not _text(
                statement
            ):
                found.append(f"{place(root, file, statement)} is neither a hook nor a constant: move it")
    return found


HARMLESS = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)


def _text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def private_modules_have_no_public_class(root: Path) -> list[str]:
    """jsonargparse can't resolve the short name of a class that lies in a ``_private`` module."""
    found = []
    for file in (*core_files(root), *(f for files in plugin_sources(root).values() for f in files)):
        parts = file.relative_to(root).with_suffix("").parts
        if any(p.startswith("_") and not p.startswith("__") for p in parts):
            for node in parse(file).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found.append(
                        f"{place(root, file, node)} {node.name} is public: YAML can't name it in a _private module"
                    )
    return found


def heavy_packages_are_imported_where_used(root: Path) -> list[str]:
    """Core imports heavy packages inside functions, but for files that are nothing without one: ``AT_TOP``."""
    found = []
    for file in core_files(root):
        allowed = tuple(p for start, p in AT_TOP if file.relative_to(root).as_posix().startswith(start))
        for node in at_import(parse(file)):
            for module in imported(node):
                if _is(module, HEAVY) and not (allowed and _is(module, allowed)):
                    found.append(
                        f"{place(root, file, node)} imports {module} at module level: import it where it is used"
                    )
    return sorted(set(found))


def names_say_something(root: Path) -> list[str]:
    """No utils, helpers, common, misc or base2, as a file or as a folder."""
    found = []
    for file in [*python_files(root / "core"), *python_files(root / "plugins"), *python_files(root / "tests")]:
        parts = file.relative_to(root).with_suffix("").parts
        if any(VAGUE.match(p) for p in parts):
            found.append(f"{place(root, file)}: a file's name says the one idea in it")
    return found


def no_machine_paths(root: Path, files: list[Path]) -> list[str]:
    """No absolute path of somebody's machine and no package registry's host, in any text file of the repository."""
    found = []
    for file in files:
        if file.suffix not in TEXT or not file.is_file():
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="ignore").splitlines(), 1):
            for pattern, what in ((MACHINE_PATH, "path of a machine"), (REGISTRY_HOST, "registry host")):
                if hit := pattern.search(line):
                    found.append(f"{file.relative_to(root).as_posix()}:{number} holds a {what}: {hit.group(0)}")
    return found


def files_are_short(root: Path) -> list[str]:
    """No file of core or of a plugin is longer than 400 lines, and nine in ten have at most 300."""
    sizes = {
        place(root, file): len(file.read_text(encoding="utf-8").splitlines())
        for file in (*core_files(root), *(f for files in plugin_sources(root).values() for f in files))
    }
    found = [
        f"{name} has {size} lines, more than {LONGEST}: split it by idea"
        for name, size in sizes.items()
        if size > LONGEST
    ]
    long = [name for name, size in sizes.items() if size > USUAL]
    if len(long) > len(sizes) / 10:
        found.append(f"{len(long)} of {len(sizes)} files have more than {USUAL} lines: {', '.join(long)}")
    return found
