"""Write what the docs take from the code into ``docs/generated/``: components, configs, what fits what, papers.

``python docs/generate.py`` runs before ``mkdocs build`` and writes the same files for the same installation.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from quire.plugins import Plugins, load
from quire.registry import KINDS, Entry

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RECIPES = sorted((ROOT / "configs" / "mixes").glob("*.yaml"))
PLURAL = {"data": "data modules", "part": "parts"}
SECTION = re.compile(r"^(Args|Needs|Fields|Attributes|Returns|Raises|Paper):\s*(.*)$")
LINK = re.compile(r"(!?)\[([^\[\]]*)\]\((?!https?://|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


# ---- markdown
def table(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; a line break in a cell becomes a space."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(" ".join(str(c).split()) for c in line) + " |" for line in lines) + "\n"


def code(text: str) -> str:
    """A code span, empty for nothing."""
    return f"`{text}`" if text else ""


def write(file: Path, *blocks: str) -> None:
    """Blocks separated by blank lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n\n".join(b.rstrip("\n") for b in blocks if b) + "\n", encoding="utf-8")


# ---- docstrings and signatures
def sections(doc: str) -> dict[str, str]:
    """A docstring by section: ``""`` is the text before the first one."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in inspect.cleandoc(doc).splitlines():
        if match := SECTION.match(line):
            name = match[1]
            found[name] = [match[2]] if match[2] else []
        else:
            found[name].append(line)
    return {k: inspect.cleandoc("\n".join(v)).strip() for k, v in found.items()}


def described(text: str) -> dict[str, str]:
    """``name: what it is`` lines, continuation lines joined."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        match = re.match(r"^\*{0,2}(\w+)(?:, \*{0,2}\w+)*: (.*)", line)
        if match:
            found[match[1]] = match[2]
        elif found and line.strip():
            found[list(found)[-1]] += " " + line.strip()
    return found


def arguments(cls: type) -> list[tuple[str, str, str, str]]:
    """Name, type, default and meaning of everything that YAML may write, those handed on by ``**kwargs`` included."""
    found: dict[str, inspect.Parameter] = {}
    meaning: dict[str, str] = {}
    for base in cls.__mro__:
        meaning = {**described(sections(base.__doc__ or "").get("Args", "")), **meaning}
        init = base.__dict__.get("__init__")
        if init is None:
            continue
        parameters = list(inspect.signature(init).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                found.setdefault(parameter.name, parameter)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return [(n, _type(p.annotation), _default(p.default), meaning.get(n, "")) for n, p in found.items()]


def _type(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else json.dumps(value, default=str)
    )


# ---- components
def components(plugins: Plugins, out: Path) -> list[str]:
    """One page a kind and an index. Returns a sentence for each component that can't be imported."""
    broken: list[str] = []
    index: list[list[str]] = []
    for kind in KINDS:
        entries = [e for e in plugins.registry if e.kind == kind]
        title = PLURAL.get(kind, kind + "s")
        blocks = [f"# {title.capitalize()}"]
        for entry in entries:
            index.append([f"[{entry.name}]({kind}.md#{entry.name.lower()})", kind, ", ".join(entry.role), entry.plugin])
            index[-1].append(entry.summary())
            try:
                blocks += component(entry)
            except Exception as error:  # a component's module may fail in any way; the others are still described
                broken.append(f"{entry.name} ({entry.plugin}): {type(error).__name__}: {error}")
        write(out / "components" / f"{kind}.md", *blocks, "" if entries else f"No {title} are installed.")
    head = ["name", "kind", "roles", "plugin", "what"]
    about = "Every component that YAML can name. `quire components` prints the same table for what you have installed."
    write(out / "components" / "index.md", "# Components", about, table(head, index))
    return broken


def component(entry: Entry) -> list[str]:
    """The Markdown blocks of one component."""
    from quire.contracts import needed_roles

    cls = entry.load()
    parts = sections(cls.__doc__ or "")
    facts = [f"Plugin {code(entry.plugin)}", code(entry.path)]
    facts += [f"roles {', '.join(map(code, entry.role))}"] if entry.role else []
    needs = [f"{slot}: {code(role.__name__)}" for slot, role in needed_roles(cls).items()]
    for slot, words in getattr(cls, "requires", {}).items():
        needs.append(f"{slot} with {', '.join(code(w) for w in sorted(words))}")
    facts += [f"needs {', '.join(needs)}"] if needs else []
    fields = [f.replace("|", " or ") for f in getattr(cls, "fields", ())]
    facts += [f"{'offers' if entry.kind == 'data' else 'reads'} {', '.join(map(code, fields))}"] if fields else []
    rows = [[code(n), code(t), code(d), meaning] for n, t, d, meaning in arguments(cls)]
    blocks = [f"## {entry.name}", parts[""], "; ".join(facts) + "."]
    blocks += [table(["argument", "type", "default", "meaning"], rows)] if rows else ["No arguments."]
    for name in ("Needs", "Fields", "Returns", "Raises", "Paper"):
        blocks += [f"**{name}** {' '.join(parts[name].split())}"] if parts.get(name) else []
    example = tiny(cls)
    return [*blocks, f"The smallest run that uses it:\n\n```yaml\n{example}```"] if example else blocks


def tiny(cls: type) -> str:
    """The component's own smallest run as YAML; empty when it declares none."""
    from quire.errors import ConfigError

    try:
        run = cls.tiny()  # type: ignore[attr-defined]
    except (AttributeError, ConfigError):
        return ""
    text = yaml.safe_dump(run, sort_keys=False, default_flow_style=None, width=100)
    return re.sub(re.escape(tempfile.gettempdir()) + r"/\w+", "FOLDER", text)  # made anew by each call


# ---- configs, what fits what
def configs(plugins: Plugins, out: Path) -> None:
    """Every YAML file that a plugin or the repository ships, in full."""
    blocks = [
        "# Configs",
        "Run one with `lightning fit -c NAME`; a later `-c` file or option overrides an earlier one.",
    ]
    shipped = {**plugins.configs(), **{str(p.relative_to(ROOT)): p for p in sorted((ROOT / "configs").rglob("*.yaml"))}}
    for name, file in shipped.items():
        blocks += [f"## {name}", f"```yaml\n{file.read_text(encoding='utf-8').rstrip()}\n```"]
    write(out / "configs.md", *blocks)


def matrix(out: Path) -> None:
    """What ``quire matrix`` says, by the part that needs another."""
    from quire import commands
    from quire.contracts import needed_roles

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        commands.matrix(["--json"])
    fits: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
    for pair in json.loads(printed.getvalue()):
        if pair["asks"]:
            fits.setdefault((pair["part"], pair["slot"]), ([], []))[not pair["fits"]].append(pair["with"])
    rows = []
    for (part, slot), (good, bad) in fits.items():
        if bad:
            role = needed_roles(load().registry.get(part).load()).get(slot)
            rows.append([part, slot, code(role.__name__ if role else ""), ", ".join(good) or "none", ", ".join(bad)])
    about = (
        "Parts that declare what they need of `model.encoder`, `model.decoder` or `model.objective`, and which "
        "installed components have it. A part that is not listed takes any. The same declarations refuse a pair "
        "before the first step; `quire matrix --json` gives the sentence of each refusal. What depends on arguments "
        "(a size, a position table) is checked when the model is made."
    )
    write(out / "matrix.md", "# What fits what", about, table(["part", "slot", "needs", "fits", "does not fit"], rows))


# ---- papers
def papers(plugins: Plugins, out: Path) -> None:
    """One page a plugin: its README, then what it registers and ships."""
    for readme in sorted((ROOT / "plugins").glob("*/README.md")):
        name = readme.parent.name
        text = relink(readme.read_text(encoding="utf-8"), readme.parent, out / "papers")
        blocks = [text]
        entries = [e for e in plugins.registry if e.plugin == name]
        if entries:
            rows = [[f"[{e.name}](../components/{e.kind}.md#{e.name.lower()})", e.kind, e.summary()] for e in entries]
            blocks += ["## What it registers", table(["name", "kind", "what"], rows)]
        shipped = [c for c in plugins.configs() if c.startswith(name + "/")]
        if shipped:
            links = ", ".join(f"[{c}](../configs.md#{c.replace('/', '').replace('.', '')})" for c in shipped)
            blocks += ["## Configs it ships", links + "."]
        write(out / "papers" / f"{name}.md", *blocks)


def relink(text: str, home: Path, page_folder: Path) -> str:
    """Links of a README, seen from its page: pictures are copied, pages of the docs linked, other files named."""

    def link(match: re.Match[str]) -> str:
        bang, label, target, anchor = match.group(1), match.group(2), match.group(3), match.group(4) or ""
        file = (home / target).resolve()
        if bang and file.is_file():
            copy = page_folder / f"{home.name}-{file.name}"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
            return f"![{label}]({copy.name})"
        if file.is_relative_to(DOCS):
            return f"{bang}[{label}]({os.path.relpath(file, DOCS / 'generated' / 'papers')}{anchor})"
        return f"{label} (`{file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else target}`)"

    return LINK.sub(link, text)


# ---- pieces that pages include
def snippets(plugins: Plugins, out: Path) -> None:
    """The batch fields, the commands, each hook, and the pictures that exist."""
    from quire.__main__ import LIGHTNING
    from quire.data import FIELDS

    folder = out / "snippets"
    write(folder / "fields.md", table(["field", "shape, type, unit"], [[code(n), t] for n, t in FIELDS.items()]))
    rows = [[code(n), LIGHTNING_SAYS[n]] for n in LIGHTNING]
    rows += [[code(n), about] for n, (_, about, _) in sorted(plugins.commands.items())]
    write(folder / "commands.md", table(["command", "what it does"], rows))
    for name, signature, doc in hooks():
        write(folder / f"{name}.md", f"```python\n{signature}\n```", doc)
    recipes = [(file, file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")) for file in RECIPES]
    rows = [[f"[{f.stem}](generated/configs.md#configsmixes{f.stem}yaml)", why] for f, why in recipes]
    write(folder / "recipes.md", table(["recipe", "who would want it"], rows))
    pictures = [f"![{alt}](images/{file})" for file, alt in PICTURES.items() if (DOCS / "images" / file).is_file()]
    write(folder / "pictures.md", *pictures)


LIGHTNING_SAYS = {
    "fit": "train",
    "validate": "evaluate on the validation split",
    "test": "evaluate on the test split",
    "predict": "draw from the sampler, or encode",
}
PICTURES = {
    "mp3-digits.png": "The claim of mp3 on digits: test accuracy of each arm and its controls",
    "prototypes-digits.png": "The claim of prototypes on digits: the arms and their controls",
}


def hooks() -> list[tuple[str, str, str]]:
    """Name, signature and docstring of each hook, read from the source."""
    source = ROOT / "core" / "quire" / "hooks.py"
    found = []
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and any("hookspec" in ast.unparse(d) for d in node.decorator_list):
            signature = f"def {node.name}({ast.unparse(node.args)}) -> None"
            found.append((node.name, signature, ast.get_docstring(node) or ""))
    return found


# ---- all of it
def generate(out: Path) -> list[str]:
    """Write every generated page into ``out``, which is emptied first. Returns what could not be described."""
    shutil.rmtree(out, ignore_errors=True)
    plugins = load()
    broken = [f"plugin {r.name}: {r.error}" for r in plugins.records.values() if r.error]
    broken += components(plugins, out)
    configs(plugins, out)
    papers(plugins, out)
    snippets(plugins, out)
    if not broken:
        matrix(out)
    return broken


def main() -> int:
    """Exit code 1 when a plugin or component can't be described."""
    broken = generate(DOCS / "generated")
    for line in broken:
        print(f"error: {line}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
