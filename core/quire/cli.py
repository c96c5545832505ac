"""``fit``, ``validate``, ``test``, ``predict``: LightningCLI with short names, one-line errors and a run folder."""

from __future__ import annotations

import contextlib
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
    load().registry.import_named(_words(argv))
    warnings.filterwarnings("ignore", message=".*is an instance of `nn.Module` and is already saved.*")
    _cli_class()(_name(argv), args=argv)


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
    raise ConfigError(f"no config file {name}{suggest(name, list(shipped)) or '; quire configs lists those of plugins'}")


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
    shipped = {p.resolve(): n for n, p in load().configs().items()}
    return shipped.get(path, path.stem)


# ---- Lightning
def _cli_class() -> type:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

    from quire.data import DataModule
    from quire.model import Model
    from quire.predictions import WritePredictions

    class Parser(LightningArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise ConfigError(one_line(message)) from ex

    class SaveConfig(SaveConfigCallback):
        """The full config beside the run's metrics; running again into the same folder replaces it."""

    class CLI(LightningCLI):
        def __init__(self, run_name: str, args: list[str]) -> None:
            self.run_name = run_name
            super().__init__(
                Model,
                DataModule,
                subclass_mode_data=True,
                parser_class=Parser,
                save_config_callback=SaveConfig,
                save_config_kwargs={"overwrite": True},
                trainer_defaults={"callbacks": []},
                args=args,
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
            trainer.callbacks.extend(extra)
            return trainer

    return CLI


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint under a run folder. Raises ``ConfigError`` when there is none."""
    found = sorted(folder.glob("version_*/checkpoints/*.ckpt"), key=lambda p: p.stat().st_mtime_ns)
    if not found:
        raise ConfigError(f"ckpt_path last: no checkpoint under {folder}")
    return found[-1]


# ---- errors
_NOISE = re.compile(r"^(?:Parser key|Validation failed|Problem with given class_path|Unexpected|.*Union)", re.S)


def one_line(message: str) -> str:
    """jsonargparse's nested report → the key's path, the reason, the nearest name.

    The report names a key per level (``Parser key "model.encoder"``), ends with the reason, and repeats it for
    each member of a union.
    """
    keys = re.findall(r'[Pp]arser key "([^"]+)"', message)
    key = ""
    for part in keys:
        key = part if not key or part.startswith(key) else f"{key}.{part}" if not key.endswith(part) else key
    lines = [line.strip(" -") for line in message.strip().splitlines() if line.strip(" -")]
    reasons = [ln for ln in lines if not ln.lower().startswith(("parser key", "from subcommand")) or ln is lines[-1]]
    reason = _best_reason(reasons or lines)
    reason = re.sub(r"^Parser key \"[^\"]+\":\s*", "", reason)
    reason += _near(reason)
    prefix = f"{key}: " if key and key not in reason else ""
    return f"{prefix}{reason}".strip()


def _best_reason(lines: list[str]) -> str:
    for wanted in ("is not a", "not accepted", "does not", "Unrecognized", "no subclass", "Group '", "required"):
        for line in reversed(lines):
            if wanted.lower() in line.lower():
                return line
    return lines[-1]


def _near(reason: str) -> str:
    words = re.findall(r"[\"']([A-Za-z_][\w.]*)[\"']", reason)
    registry = load().registry
    for word in words:
        if word[:1].isupper() and word not in registry.entries:
            return suggest(word, list(registry.entries))
    return ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence deprecation notes between Lightning and jsonargparse, which the user can't act on."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*_pytree.*")
        yield
    sys.stdout.flush()
