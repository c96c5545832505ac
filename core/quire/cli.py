"""``fit``, ``validate``, ``test``, ``predict``: LightningCLI with short names, one-line errors and a run folder."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from quire.errors import ConfigError, suggest
from quire.plugins import load


def run(argv: list[str]) -> None:
    """Run one of Lightning's subcommands. Raises ``ConfigError`` for anything wrong with what was typed."""
    argv = _configs(argv)
    words = set(_words(argv))
    load().registry.import_named(words)
    for known in (".*does not have many workers.*", ".*in eval mode at the start of training.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", message=known)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    before = sys.argv
    sys.argv = [before[0], *argv]  # what DDP's launcher starts again, once per process
    try:
        _cli_class(words)(_name(argv))
    finally:
        sys.argv = before


# ---- argv
def _configs(argv: list[str]) -> list[str]:
    """``-c mp3/digits`` → the path of the installed plugin's config."""
    out = list(argv)
    for i, flag in enumerate(out):
        if flag in ("-c", "--config") and i + 1 < len(out):
            out[i + 1] = find_config(out[i + 1])
        elif flag.startswith("--config="):
            out[i] = "--config=" + find_config(flag.partition("=")[2])
    return out


def find_config(name: str) -> str:
    """A path as it is, or ``plugin/name`` resolved. Raises ``ConfigError`` with the nearest names."""
    if Path(name).is_file():
        return name
    shipped = load().configs()
    if name in shipped:
        return str(shipped[name])
    plugin = name.partition("/")[0]
    broken = load().records.get(plugin)
    if broken is not None and broken.error:
        raise ConfigError(f"config {name}: plugin {plugin} is installed but broken ({broken.error})")
    raise ConfigError(
        f"no config file {name}{suggest(name, list(shipped)) or '; quire configs lists those of plugins'}"
    )


def _config_files(argv: list[str]) -> list[str]:
    files = [argv[i + 1] for i, a in enumerate(argv[:-1]) if a in ("-c", "--config")]
    return files + [a.partition("=")[2] for a in argv if a.startswith("--config=")]


def _words(argv: list[str]) -> Iterator[str]:
    """Every scalar of the command line and of the YAML files it names."""
    for item in argv:
        yield from re.split(r"[=\s\[\]{},:\"']+", item)
    for file in _config_files(argv):
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            where = getattr(error, "problem_mark", None)
            line = f", line {where.line + 1}" if where else ""
            raise ConfigError(f"{file} is not valid YAML{line}: {getattr(error, 'problem', error)}") from error
        if content is not None and not isinstance(content, dict):
            raise ConfigError(f"{file} must hold keys such as model and data, not a {type(content).__name__}")
        yield from _scalars(content)


def _scalars(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _scalars(item)
    elif isinstance(value, list):
        for item in value:
            yield from _scalars(item)
    elif isinstance(value, str):
        yield value


def _name(argv: list[str]) -> str:
    """Folder under ``runs/``: the last config's name, with its plugin when it is a plugin's."""
    files = _config_files(argv)
    if not files:
        return "run"
    path = Path(files[-1]).resolve()
    if path.name == "config.yaml" and path.parent.name.startswith("version_") and "runs" in path.parts:
        inside = path.parts[path.parts.index("runs") + 1 : -2]  # a run's saved config goes on under its name
        return "/".join(inside) or "run"
    shipped = {p.resolve(): n for n, p in load().configs().items()}
    return shipped.get(path, path.stem)


# ---- Lightning
def _cli_class(words: set[str]) -> type:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

    from quire.data import DataModule
    from quire.model import Model
    from quire.predictions import WritePredictions

    class Parser(LightningArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise ConfigError(one_line(message, words)) from ex

    class SaveConfig(SaveConfigCallback):
        """The full config beside the run's metrics; running again into the same folder replaces it."""

    class CLI(LightningCLI):
        def __init__(self, run_name: str) -> None:
            self.run_name = run_name
            super().__init__(
                Model,
                DataModule,
                subclass_mode_data=True,
                parser_class=Parser,
                save_config_callback=SaveConfig,
                save_config_kwargs={"overwrite": True},
                seed_everything_default=0,
            )

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.link_arguments("data.spec", "model.spec", apply_on="instantiate")

        def _parse_ckpt_path(self) -> None:
            """The YAML rules; ``Model.on_load_checkpoint`` compares it with the checkpoint."""

        def before_instantiate_classes(self) -> None:
            config = self.config[self.subcommand]
            given = config.get("ckpt_path")
            if given == "last":
                config["ckpt_path"] = str(newest_checkpoint(Path("runs") / self.run_name))
            elif given and given not in ("best", "hpc") and not str(given).startswith("registry"):
                from quire.checkpoint import read

                read(given)
            if config.get("data") is None:
                raise ConfigError("data is missing: name a data module, for example data: Digits")

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            from lightning.pytorch.callbacks import ModelCheckpoint
            from lightning.pytorch.loggers import CSVLogger

            config = self.config[self.subcommand]["trainer"]
            if config.get("logger") in (None, True) and not config.get("fast_dev_run"):
                kwargs.setdefault("logger", CSVLogger("runs", name=self.run_name))
            extra: list[Any] = [WritePredictions()] if self.subcommand == "predict" else []
            named = [c.get("class_path", "") for c in config.get("callbacks") or []]
            keeps = any(n.endswith("ModelCheckpoint") for n in named)
            if self.subcommand == "fit" and not keeps and config.get("enable_checkpointing") is not False:
                extra.append(ModelCheckpoint(save_last=True, save_on_exception=False))
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks.extend(extra)  # type: ignore[attr-defined]
            return trainer

        def after_fit(self) -> None:
            if self.trainer.is_global_zero and self.trainer.log_dir:
                for line in written(Path(self.trainer.log_dir)):
                    print(line)

    return CLI


def written(folder: Path) -> list[str]:
    """What a run left behind, one line a file, pictures and tables first."""
    order = [".png", ".html", ".csv", ".json", ".jsonl", ".safetensors", ".yaml", ".ckpt"]
    found = [p for p in folder.rglob("*") if p.suffix in order]
    return [f"wrote {p}" for p in sorted(found, key=lambda p: (order.index(p.suffix), str(p)))]


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint under a run folder. Raises ``ConfigError`` when there is none."""
    found = sorted(folder.glob("version_*/checkpoints/*.ckpt"), key=lambda p: p.stat().st_mtime_ns)
    if not found:
        raise ConfigError(f"ckpt_path last: no checkpoint under {folder}")
    return found[-1]


# ---- errors
def one_line(message: str, words: set[str]) -> str:
    """jsonargparse's report → the key, the reason and the nearest name.

    The report names the outermost key, then one error per member of a union (``- objectives: Option 'x' is not
    accepted``), each with the keys further inside.

    Args:
        message: What the parser says.
        words: Scalars of the command line and YAML, to find the classes whose options are meant.
    """
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    found = re.search(r'[Pp]arser key "([^"]+)"', message)
    key = found.group(1) if found else ""
    reasons = [
        line.removeprefix("- ") for line in lines if not line.startswith(('Parser key "', "Subtypes:", "Given "))
    ]
    reasons = [r for r in reasons if not r.startswith(_EMPTY)] or lines[-1:]
    reason = next((r for r in reasons if _meaning(r)), reasons[0])
    inner = re.match(r"((?:[a-z_][\w.]*: )*)(.*)", reason, re.S)
    assert inner is not None  # the pattern matches any text
    path = ".".join([key, *(k for k in inner.group(1).split(": ") if k)]).strip(".")
    return f"{path}: {_said(inner.group(2), words)}" if path else _said(inner.group(2), words)


_EMPTY = (
    "Expected a <class 'NoneType'>",
    "Does not validate",
    "Errors:",
    "Expected a path",
    "Not a valid subclass",
    "a class path (str)",
)


def _meaning(reason: str) -> bool:
    return any(m in reason for m in ("is not accepted", "dot import path", "Got value", "are required", "not accept"))


def _said(reason: str, words: set[str]) -> str:
    if match := re.search(r"Option '([\w.]+)' is not accepted", reason):
        return f"there is no option {match[1]!r} here{suggest(match[1], _options(words))}"
    if match := re.search(r"does not accept option '([\w.]+)'", reason):
        return f"there is no key {match[1]!r}{_near_key(match[1], words)}"
    if match := re.search(r"[Uu]nrecognized arguments: (.*)", reason):
        word = match[1].split()[0].partition("=")[0]
        return f"there is no argument {word}{_near_key(word.lstrip('-'), words)}"
    if match := re.search(r"dot import path string: (\S+)", reason):
        return _not_here(match[1])
    if match := re.search(r"arguments are required: (.*)", reason):
        return f"{match[1]} is missing"
    if match := re.search(r"Expected an? <class '(\w+)'>\. Got value: (.*)", reason):
        return f"{match[2]!r} is not {'an' if match[1] == 'int' else 'a'} {match[1]}"
    return reason


def _near_key(key: str, words: set[str]) -> str:
    top = ["model", "data", "trainer", "config", "ckpt_path", "seed_everything"]
    head, _, rest = key.partition(".")
    return suggest(rest.rpartition(".")[2], _options(words)) if head in top else suggest(head, top)


def _not_here(word: str) -> str:
    registry = load().registry
    if word in registry.entries:
        entry = registry.entries[word]
        kind = " ".join([*entry.role, "part"]) if entry.kind == "part" else entry.kind
        return f"{word} is a {kind}, which can't stand here"
    broken = [f"{r.name} ({r.error})" for r in load().records.values() if r.error]
    hint = f"; broken plugins: {', '.join(broken)}" if broken else ""
    wanted = os.environ.get("QUIRE_PLUGINS")
    hint += f"; QUIRE_PLUGINS={wanted} leaves the others out" if wanted is not None else ""
    near = suggest(word, list(registry.entries))
    return f"no installed component is named {word}{near or '; quire components lists them'}{hint}"


def _options(words: set[str]) -> list[str]:
    """Names of the options of every component that the run names, of Model and of the Trainer."""
    import inspect

    from lightning.pytorch import Trainer

    from quire.model import Model

    registry = load().registry
    classes = [registry.entries[w].load() for w in words if w in registry.entries]
    found: dict[str, None] = {}
    for cls in (*classes, Model, Trainer):
        for base in cls.__mro__[:-1]:
            if "__init__" in base.__dict__:
                found |= dict.fromkeys(inspect.signature(base.__dict__["__init__"]).parameters)
    return [n for n in found if n not in ("self", "args", "kwargs")]
