"""``fit``, ``validate``, ``test``, ``predict``: LightningCLI with short names, one-line errors and a run folder."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

from quire.errors import ConfigError, suggest
from quire.parse_errors import one_line
from quire.plugins import load

_KNOWN = (  # remarks on what Quire does on purpose; a resumed run has a folder of its own
    ".*does not have many workers.*",
    ".*in eval mode at the start of training.*",
    ".*LeafSpec.*",
    "The dirpath has changed from.*",
    ".*returned a view tensor.*",
)


def run(argv: list[str]) -> None:
    """Run one of Lightning's subcommands. Raises ``ConfigError`` for anything wrong with what was typed."""
    argv = _configs(argv)
    words = set(_words(argv))
    load().registry.import_named(words)
    for known in _KNOWN:
        warnings.filterwarnings("ignore", message=known)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    before = sys.argv
    sys.argv = [before[0], *argv]  # what DDP's launcher starts again, once per process
    given = _in_group()  # a launcher such as Ray makes the group and ends it
    try:
        _cli_class(argv[0], words)(_name(argv))
        if _in_group() and not given:
            # Lightning ends NCCL's group only. Not after an error: the others would wait for one that is gone
            torch.distributed.destroy_process_group()
    finally:
        sys.argv = before


def _in_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


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
        if content is None:
            raise ConfigError(f"{file} is empty: it must hold keys such as model and data")
        if not isinstance(content, dict):
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
def _cli_class(command: str, words: set[str]) -> type:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from quire.data import DataModule
    from quire.model import Model
    from quire.predictions import WritePredictions

    class Parser(LightningArgumentParser):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, allow_abbrev=False, **kwargs)  # half a key is a typo, not a shorthand

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

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            """The one that was asked for: a parser of each costs as much as all the rest of the start."""
            return {command: LightningCLI.subcommands()[command]}

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.link_arguments("data.spec", "model.spec", apply_on="instantiate")

        def _parse_ckpt_path(self) -> None:
            """The YAML rules; ``Model.on_load_checkpoint`` compares it with the checkpoint."""

        def before_instantiate_classes(self) -> None:
            config = self.config[self.subcommand]
            given = config.get("ckpt_path")
            if given == "last":
                config["ckpt_path"] = str(newest_checkpoint(Path("runs") / self.run_name))
            elif given == "best":
                raise ConfigError("ckpt_path best is known only to the run that found it: give the file, or last")
            elif given and given != "hpc" and not str(given).startswith("registry"):
                from quire.checkpoint import is_sharded, read

                if not is_sharded(given):
                    read(given)
            if config.get("data") is None:
                raise ConfigError("data is missing: name a data module, for example data: Digits")

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            from lightning.pytorch.callbacks import ModelCheckpoint
            from lightning.pytorch.loggers import CSVLogger

            from quire.checkpoint import write_whole_files

            given = self.config_init[self.subcommand]["trainer"]
            if given.get("logger") in (None, True) and not given.get("fast_dev_run"):
                kwargs.setdefault("logger", CSVLogger("runs", name=self.run_name))
            listed = given.get("callbacks") or []
            callbacks = list(listed) if isinstance(listed, list) else [listed]
            if self.subcommand == "predict":
                callbacks.append(WritePredictions())
            keeps = any(isinstance(c, ModelCheckpoint) for c in callbacks)
            if self.subcommand == "fit" and not keeps and given.get("enable_checkpointing") is not False:
                callbacks.append(ModelCheckpoint(save_last=True, save_on_exception=False))
            if getattr(self.model.objective, "players", ()) and wants_ddp(given):
                kwargs["strategy"] = "ddp_find_unused_parameters_true"  # one player's step leaves the others' unused
            try:
                trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
            except (ValueError, TypeError, MisconfigurationException) as error:
                raise ConfigError(trainer_error(error, given)) from error
            write_whole_files(trainer)
            return trainer

        def after_fit(self) -> None:
            folder = self.trainer.log_dir  # asked on every rank: it waits for rank 0
            if self.trainer.is_global_zero and folder:
                for line in written(Path(folder)):
                    print(line)

    return CLI


def wants_ddp(given: Mapping[str, Any]) -> bool:
    """Whether the Trainer's arguments ask for plain DDP, in words or by several devices."""
    devices = given.get("devices")
    many = (isinstance(devices, (list, tuple)) and len(devices) > 1) or str(devices) not in ("auto", "None", "1", "[0]")
    return given.get("strategy") == "ddp" or (given.get("strategy") in (None, "auto") and many)


def written(folder: Path) -> list[str]:
    """What a run left behind, one line a file, pictures and tables first."""
    order = [".png", ".html", ".csv", ".json", ".jsonl", ".safetensors", ".yaml", ".ckpt"]
    found = [p for p in folder.rglob("*") if p.suffix in order]
    return [f"wrote {p}" for p in sorted(found, key=lambda p: (order.index(p.suffix), str(p)))]


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint under a run folder that can be read; a kill may have left the last one in pieces.

    Raises:
        ConfigError: there is none, or all are broken.
    """
    from quire.checkpoint import is_sharded, read

    found = sorted(folder.glob("version_*/checkpoints/*.ckpt"), key=lambda p: p.stat().st_mtime_ns, reverse=True)
    broken = []
    for file in found:
        try:
            if not is_sharded(file):
                read(file)
        except ConfigError as error:
            broken.append(str(error))
            continue
        for said in broken:
            print(f"ckpt_path last: passed over a newer file: {said}", file=sys.stderr)
        return file
    hint = f" that can be read: {broken[0]}" if broken else ": train first, or give the file"
    raise ConfigError(f"ckpt_path last: no checkpoint under {folder}{hint}")


def trainer_error(error: Exception, given: Mapping[str, Any]) -> str:
    """What the Trainer says of its arguments, with the key that it is about."""
    said = " ".join(str(error).split("Find a complete")[0].split()).rstrip(".!, ")
    keys = ("accelerator", "strategy", "devices", "precision", "num_nodes", "logger", "profiler")
    named = next((k for k in keys if f"`{k}" in said or f"{k}=" in said), None)
    named = named or next((k for k in keys if isinstance(given.get(k), str) and given[k] in said.split()), None)
    return f"trainer{f'.{named}' if named else ''}: {said}; quire doctor shows what this machine has"
