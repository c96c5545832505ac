"""The YAML files that a plugin ships: each says what it means, trains, and predicts."""

from __future__ import annotations

import inspect
import io
import re
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from quire.__main__ import execute
from quire.plugins import load
from quire.testing.assembly import need_data
from quire.testing.fresh import SHORT
from quire.testing.quiet import folder, quietly, working_in
from quire.testing.verdict import Fault, Skip

PARSE_ONLY = "(parse only)"
AFTER = re.compile(r"\(after ([\w-]+/[\w-]+)\)")


def config_reparses(name: str) -> None:
    """``--print_config`` of it, given back as a config, prints the same."""
    with tempfile.TemporaryDirectory(dir=folder()) as place:
        once = _printed(name, name)
        file = Path(place) / "printed.yaml"
        file.write_text(once, encoding="utf-8")
        again = _printed(str(file), f"what --print_config gives for {name}")
    if once != again:
        changed = next(a for a, b in zip([*once.splitlines(), ""], [*again.splitlines(), ""]) if a != b)
        raise Fault(f"{name}: --print_config reparses to another config, first at {changed.strip()!r}")


def _printed(config: str, what: str) -> str:
    code, out, err = call(["fit", "-c", config, "--print_config"])
    if code:
        raise Fault(f"{what} does not parse: {err.strip()}")
    return out


def config_runs(name: str) -> None:
    """Two steps of ``fit``, then ``predict`` from the checkpoint where there is something to predict with."""
    path = load().configs()[name]
    text = path.read_text(encoding="utf-8")
    remark = text.partition("\n")[0]
    if PARSE_ONLY in remark:
        raise Skip(f"marked {PARSE_ONLY}")
    need_data(text)
    content: dict[str, Any] = yaml.safe_load(text) or {}
    with tempfile.TemporaryDirectory(dir=folder()) as place, working_in(Path(place)):
        before = AFTER.search(remark)
        if before:
            _run("fit", before[1])
        _run("fit", name, few_samples(content))
        model = content.get("model") or {}
        if model.get("sampler") or model.get("encoder"):
            saved = ["--ckpt_path=last"] if list(Path("runs", name).rglob("*.ckpt")) else []
            _run("predict", name, few_samples(content), ["--trainer.limit_predict_batches=1", *saved])


def _run(command: str, name: str, fewer: list[str] | None = None, more: list[str] | None = None) -> None:
    argv = [command, "-c", name, *SHORT, *(more or [])]
    code, _, err = call([*argv, *(fewer or [])])
    if code and fewer:  # what fails on a part of the data may need all of it
        code, _, err = call(argv)
    if code:
        raise Fault(f"lightning {command} -c {name}: {err.strip()}")


def few_samples(content: dict[str, Any]) -> list[str]:
    """The option that keeps two batches of training samples, where the data module takes it and the config doesn't."""
    data = content.get("data")
    data = {"class_path": data} if isinstance(data, str) else data or {}
    given = data.get("init_args") or {}
    entry = load().registry.entries.get(str(data.get("class_path", "")).rpartition(".")[2])
    if entry is None or "train_samples" in given or not _takes(entry.load(), "train_samples"):
        return []
    return [f"--data.init_args.train_samples={2 * int(given.get('batch_size', 64))}"]


def _takes(cls: type, name: str) -> bool:
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters
            if name in parameters or not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                return name in parameters
    return False


def call(argv: list[str]) -> tuple[int, str, str]:
    """The console script in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    here = Path.cwd()
    with quietly(), working_in(here), redirect_stdout(out), redirect_stderr(err):
        code = execute(argv)
    return code, out.getvalue(), err.getvalue()
