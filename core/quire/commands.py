"""``quire plugins|components|configs|doctor|matrix|new|export``; only the last, matrix and a full doctor need torch."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from quire.errors import ConfigError, suggest
from quire.plugins import load
from quire.registry import KINDS


class Arguments(argparse.ArgumentParser):
    """argparse whose complaints are a ``ConfigError``."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage."""
        raise ConfigError(f"{self.prog}: {message}; {self.prog} --help shows what it takes")


def _parser(name: str, about: str) -> Arguments:
    parser = Arguments(prog=f"quire {name}", description=about)
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    return parser


def table(rows: list[list[str]], head: list[str]) -> str:
    """Plain columns, wide enough for their content."""
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(str(c).ljust(w) for c, w in zip(row, widths)).rstrip() for row in [head, *rows]]
    return "\n".join(lines)


def plugins(argv: list[str]) -> int:
    """List installed plugins; a broken one with its error."""
    options = _parser("plugins", "installed plugins").parse_args(argv)
    records = list(load().records.values())
    if options.json:
        print(json.dumps([asdict(r) for r in records], indent=2))
        return 0
    rows = [[r.name, r.distribution, r.version, r.error or "ok"] for r in records]
    print(table(rows, ["plugin", "distribution", "version", "state"]))
    return 0


def components(argv: list[str]) -> int:
    """List every component; with a name, its path and its whole docstring."""
    parser = _parser("components", "every component that YAML can name")
    parser.add_argument("name", nargs="?", help="one component")
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--plugin")
    options = parser.parse_args(argv)
    registry = load().registry
    if options.plugin and options.plugin not in load().records:
        near = suggest(options.plugin, list(load().records)) or "; quire plugins lists them"
        raise ConfigError(f"no plugin is named {options.plugin}{near}")
    found = [registry.get(options.name)] if options.name else list(registry)
    found = [e for e in found if options.kind in (None, e.kind) and options.plugin in (None, e.plugin)]
    if options.json:
        print(json.dumps([{**asdict(e), "summary": e.summary()} for e in found], indent=2))
    elif options.name:
        entry = found[0]
        print(f"{entry.name}: {entry.kind}, plugin {entry.plugin}\n{entry.path}\n\n{entry.docstring()}")
        if entry.kind in ("encoder", "decoder", "objective", "sampler"):
            print(f"\nTypes and defaults: lightning fit --model.{entry.kind}.help={entry.name}")
    else:
        rows = [[e.name, e.kind, ", ".join(e.role), e.plugin, e.summary()[:72]] for e in found]
        print(table(rows, ["name", "kind", "roles", "plugin", "what"]))
    return 0


def configs(argv: list[str]) -> int:
    """List the YAML files that plugins ship."""
    options = _parser("configs", "configs for -c plugin/name").parse_args(argv)
    found = load().configs()
    if options.json:
        print(json.dumps({name: str(path) for name, path in found.items()}, indent=2))
        return 0
    rows = [[name, _first_comment(path)] for name, path in found.items()]
    print(table(rows, ["config", "what"]))
    return 0


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def doctor(argv: list[str]) -> int:
    """Check the installation. Exit code 1 when something is broken."""
    parser = _parser("doctor", "check versions, plugins, components and the machine")
    parser.add_argument("--fast", action="store_true", help="do not import torch or any component")
    options = parser.parse_args(argv)
    checks: list[tuple[str, bool, str]] = [("python", sys.version_info >= (3, 10), sys.version.split()[0])]
    for name, least in (("torch", "2.10"), ("lightning", "2.6"), ("jsonargparse", "4.50"), ("pluggy", "1.5")):
        checks.append(_version_check(name, least))
    for record in load().records.values():
        text = f"{record.distribution} {record.version}" + (f": {record.error}" if record.error else "")
        checks.append((f"plugin {record.name}", record.error is None, text))
    for name, entries in load().registry.clashes.items():
        checks.append((f"name {name}", False, "claimed by " + " and ".join(e.plugin for e in entries)))
    if not options.fast:
        checks += [*_component_checks(), *_machine_checks()]
    if options.json:
        print(json.dumps([{"check": n, "ok": ok, "detail": d} for n, ok, d in checks], indent=2))
    else:
        print(table([[n, "ok" if ok else "BROKEN", d] for n, ok, d in checks], ["check", "state", "detail"]))
    return 0 if all(ok for _, ok, _ in checks) else 1


def _version_check(name: str, least: str) -> tuple[str, bool, str]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        have = version(name)
    except PackageNotFoundError:
        return name, False, f"not installed, at least {least} is needed"
    numbers = [int(n) for n in re.findall(r"\d+", have)[:2]]
    return name, numbers >= [int(n) for n in least.split(".")], f"{have} (at least {least})"


def _component_checks() -> list[tuple[str, bool, str]]:
    broken = []
    registry = load().registry
    for entry in registry:
        try:
            entry.load()
        except Exception as error:  # any import can fail in any way
            broken.append((f"component {entry.name}", False, f"{entry.plugin}: {type(error).__name__}: {error}"))
    return broken or [("components", True, f"all {len(registry.entries)} import")]


def _machine_checks() -> list[tuple[str, bool, str]]:
    import torch

    if torch.cuda.is_available():
        return [("machine", True, f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")]
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    slow = (
        "" if "avx512_bf16" in flags or "amx_bf16" in flags else "; keep trainer.precision 32-true, bf16 is slow here"
    )
    return [("machine", True, f"CPU, {torch.get_num_threads()} threads{slow}")]


def matrix(argv: list[str]) -> int:
    """Which encoder and decoder fit which objective and sampler, by the roles they declare."""
    options = _parser("matrix", "which parts fit which").parse_args(argv)
    from quire.matching import asks, class_refusal

    registry = load().registry
    by_kind = {kind: [e for e in registry if e.kind == kind] for kind in ("encoder", "decoder", "objective", "sampler")}
    found: list[dict[str, Any]] = []
    for needer in [*by_kind["objective"], *by_kind["sampler"], *by_kind["decoder"]]:
        for slot in ("encoder", "decoder", "objective"):
            for given in by_kind[slot] if slot != needer.kind else ():
                said = class_refusal(needer.load(), slot, given.load())
                pair = {"part": needer.name, "slot": slot, "with": given.name, "fits": not said, "why": said or ""}
                found.append({**pair, "asks": asks(needer.load(), slot)})
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for slot in ("encoder", "decoder"):
        names = [e.name for e in by_kind[slot]]
        rows = []
        for needer in [*by_kind["objective"], *by_kind["sampler"]]:
            pairs = {f["with"]: f for f in found if f["part"] == needer.name and f["slot"] == slot}
            if any(f["asks"] for f in pairs.values()):
                rows.append([needer.name, *("yes" if pairs[n]["fits"] else "-" for n in names)])
        print(table(rows, [f"with {slot}", *names]) + "\n")
    print(
        "A part without a row in a table asks nothing of that slot. quire matrix --json says why a pair does not fit."
    )
    return 0


def new(argv: list[str]) -> int:
    """Render the plugin template: a package with one objective, a config, tests."""
    parser = Arguments(prog="quire new", description="start a plugin of your own")
    parser.add_argument("what", choices=["plugin"])
    parser.add_argument("name", help="lower-case, for instance my-method")
    parser.add_argument("--folder", default=".", help="where to put it (default: here)")
    options = parser.parse_args(argv)
    name = options.name
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ConfigError(f"plugin name {name!r}: use lower-case letters, digits and single dashes, like my-method")
    if name in load().records:
        raise ConfigError(f"a plugin named {name} is already installed: choose another name")
    target = Path(options.folder) / name
    if target.exists():
        raise ConfigError(f"{target} already exists: choose another name or --folder")
    words = {"__name__": name, "__module__": "quire_" + name.replace("-", "_"), "__Class__": _camel(name)}
    for source, text in _template_files():
        place = target / _fill(source, words)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(_fill(text, words), encoding="utf-8")
    print(f"made {target}\nnext:\n  pip install -e {target}\n  lightning fit -c {name}/tiny\n  pytest {target}")
    return 0


def export(argv: list[str]) -> int:
    """Write a trained model, or its encoder for timm, as safetensors."""
    parser = Arguments(
        prog="quire export", description="write a trained model, or its encoder for timm, as safetensors"
    )
    parser.add_argument("checkpoint", help="a .ckpt file, an exported folder, or hf:owner/name")
    parser.add_argument("--to", choices=["timm", "quire"], default="quire", help="whose format (default: quire)")
    parser.add_argument("-o", "--output", required=True, help="a folder; for timm a file that ends in .safetensors")
    parser.add_argument("--part", default="encoder", help="what is written for timm (default: encoder)")
    parser.add_argument("--modality", help="whose patch embedding is written, of an encoder of several")
    options = parser.parse_args(argv)
    from quire.checkpoint import export as write
    from quire.checkpoint import load as load_model

    model = load_model(options.checkpoint)
    if options.to == "quire":
        print(f"wrote {write(model, options.output)}: quire.load reads it")
        return 0
    part: Any = getattr(model, options.part, None)
    if part is None:
        raise ConfigError(f"{options.checkpoint} has no part {options.part!r}")
    if not hasattr(part, "to_timm"):
        raise ConfigError(
            f"{type(part).__name__} can't be written for timm, which has vision transformers over patches"
        )
    weights = part.to_timm(*([options.modality] if options.modality else []))
    weights.write(Path(options.output))
    print(f"wrote {options.output}: {len(weights.state)} tensors of {weights}")
    return 0


def _template_files() -> list[tuple[str, str]]:
    found = []

    def walk(folder: Any, prefix: str) -> None:
        for item in sorted(folder.iterdir(), key=lambda i: i.name):
            if item.is_dir() and item.name != "__pycache__":
                walk(item, f"{prefix}{item.name}/")
            elif item.name.endswith(".txt"):
                found.append((f"{prefix}{item.name.removesuffix('.txt')}", item.read_text(encoding="utf-8")))

    walk(files("quire") / "template", "")
    return found


def _fill(text: str, words: dict[str, str]) -> str:
    for key, value in words.items():
        text = text.replace(key, value)
    return text


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("-"))
