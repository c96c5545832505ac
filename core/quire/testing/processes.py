"""Checks that need a process of their own; one process answers them all (see ``fresh``)."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from quire.plugins import load
from quire.testing import fresh
from quire.testing.trial import folder, trial_of
from quire.testing.verdict import Fault, Skip

TIMEOUT = 300


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
    reports, output = run_fresh(plugin)
    if stage in reports:
        said = reports[stage]
        if said is None:
            return
        said = said if stage in ("hooks", "modules") else f"{said}\n{_tail(output)}"
        raise Fault(said)
    missing = next(s for s in fresh.STAGES if s not in reports)
    if missing != stage:
        raise Skip(f"not reached: the process died while it ran {missing}")
    raise Fault(f"the process died or hung while it ran {stage}:\n{_tail(output)}")


def _tail(output: str) -> str:
    return "\n".join(output.strip().splitlines()[-40:])


@functools.cache
def run_fresh(plugin: str, stages: tuple[str, ...] = fresh.STAGES) -> tuple[dict[str, str | None], str]:
    """Stage → what is wrong, None when nothing is; and everything the process printed."""
    with tempfile.TemporaryDirectory(dir=folder()) as place:
        report = Path(place) / "report.jsonl"
        config = smallest(plugin, Path(place)) if {"fit", "ddp"} & set(stages) else ""
        command = [sys.executable, "-m", "quire.testing.fresh", plugin, str(config), str(report), ",".join(stages)]
        output = _run(command, place)
        lines = report.read_text(encoding="utf-8").splitlines() if report.is_file() else []
        return {r["stage"]: r["said"] for r in map(json.loads, lines)}, output


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
