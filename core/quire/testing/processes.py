"""Checks that need a process of their own; one process answers them all (see ``fresh``)."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from quire.plugins import load
from quire.testing import fresh
from quire.testing.quiet import folder
from quire.testing.trial import trial_of
from quire.testing.verdict import Fault, Skip

TIMEOUT = 300
IMPORTS = ("hooks", "modules")


def imports_offline(plugin: str) -> None:
    """Importing needs no network; the plugin's own module leaves torch out; nothing registers at import."""
    _answer(plugin, "hooks")
    _answer(plugin, "modules")


def fits_in_a_fresh_process(plugin: str) -> None:
    """``lightning fit`` as a user runs it, two steps, no network."""
    _answer(plugin, "fit")


def trains_on_two_processes(plugin: str) -> None:
    """The same on two processes: gloo, CPU, Lightning's ``ddp``."""
    _answer(plugin, "ddp")


def _answer(plugin: str, stage: str) -> None:
    seen = run_fresh(plugin)
    if stage in seen.said:
        said = seen.said[stage]
        if said is not None:
            raise Fault(said if stage in IMPORTS else f"{said}\n{_tail(seen.output)}")
        return
    if stage not in IMPORTS and seen.no_run:
        raise Skip(seen.no_run)
    missing = next(s for s in fresh.STAGES if s not in seen.said)
    if missing != stage:
        raise Skip(f"not reached: the process died while it ran {missing}")
    raise Fault(f"the process died or hung while it ran {stage}:\n{_tail(seen.output)}")


def _tail(output: str) -> str:
    return "\n".join(output.strip().splitlines()[-40:])


@dataclass
class Seen:
    """What the fresh process reported.

    Attributes:
        said: Stage → what is wrong, None when nothing is.
        output: Everything it printed.
        no_run: Why it had nothing to train; empty when it had.
    """

    said: dict[str, str | None]
    output: str
    no_run: str = ""


@functools.cache
def run_fresh(plugin: str) -> Seen:
    """Start the process once, wait for it, and read its report."""
    with tempfile.TemporaryDirectory(dir=folder()) as place:
        report, stages, no_run = Path(place) / "report.jsonl", ",".join(fresh.STAGES), ""
        try:
            config = str(smallest(plugin, Path(place)))
        except Skip as reason:
            config, stages, no_run = "", ",".join(IMPORTS), str(reason)
        command = [sys.executable, "-m", "quire.testing.fresh", plugin, config, str(report), stages]
        output = _run(command, place)
        lines = report.read_text(encoding="utf-8").splitlines() if report.is_file() else []
        return Seen({r["stage"]: r["said"] for r in map(json.loads, lines)}, output, no_run)


def _run(command: list[str], place: str) -> str:
    own = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "PYTEST"))}
    environment = {"OMP_NUM_THREADS": "1", **own, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            return process.communicate(timeout=TIMEOUT)[0].decode(errors="replace")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.communicate()[0].decode(errors="replace") + f"\nkilled after {TIMEOUT} s"


def smallest(plugin: str, place: Path) -> Path:
    """The plugin's ``configs/tiny.yaml``, else its first objective's tiny run written as YAML."""
    shipped = load().configs().get(f"{plugin}/tiny")
    if shipped is not None:
        return shipped
    order = {"objective": 0, "encoder": 1, "decoder": 2}
    entries = sorted((e for e in load().registry if e.plugin == plugin), key=lambda e: order.get(e.kind, 3))
    for entry in entries:
        try:
            config = trial_of(entry.load()).config
        except Exception:  # another check tells
            continue
        if config["model"].get("objective"):
            file = place / "tiny.yaml"
            file.write_text(yaml.safe_dump(config), encoding="utf-8")
            return file
    raise Skip(f"{plugin} has no configs/tiny.yaml and no component whose tiny run has an objective")
