"""Arms in processes of their own that step when they are told to: they take turns, and each has its own peak memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIB = 2**20


class Arm:
    """A process that was started with ``command`` and answers each line with a line of JSON."""

    def __init__(self, command: list[str], cwd: Path) -> None:
        self.process = subprocess.Popen(
            command, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.spent: list[float] = []
        self.losses: list[float] = []
        self.grown = 0.0

    def step(self) -> None:
        """One training step of the arm."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the arm {self.process.args} ended early: run it by hand to see why")
        answer = json.loads(line)
        self.spent.append(answer["seconds"])
        self.losses.append(answer["loss"])
        self.grown = answer["grown"]

    def end(self) -> None:
        """Close its input, at which it ends."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Turns:
    """The arm's side: ``told()`` waits for a line, ``done(loss)`` answers with the CPU time since then."""

    def __init__(self) -> None:
        self.out, sys.stdout = sys.stdout, sys.stderr  # whatever else prints must not stand between answers
        self.before = peak()
        self.since = 0.0

    def told(self) -> bool:
        """Wait; False when there is no more to do."""
        if not sys.stdin.readline():
            return False
        self.since = time.process_time()
        return True

    def done(self, loss: float) -> None:
        """Answer."""
        answer = {"seconds": time.process_time() - self.since, "loss": loss, "grown": peak() - self.before}
        print(json.dumps(answer), file=self.out, flush=True)


def peak() -> float:
    """Peak resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says on Linux starts from the peak of the process that started this one
        line = next(ln for ln in status.read_text().splitlines() if ln.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB


def serve(step: Callable[[], Any]) -> None:
    """Run ``step`` once for each line."""
    turns = Turns()
    while turns.told():
        turns.done(float(step()))
