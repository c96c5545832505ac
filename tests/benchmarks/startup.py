"""What a command costs before it does anything: listing plugins, and a config printed through the whole parser."""

from __future__ import annotations

import resource
import subprocess
import sys
from statistics import median

from tests.benchmarks.clock import table

PLAIN = """
import sys
from lightning.pytorch import LightningModule, LightningDataModule
from lightning.pytorch.cli import LightningCLI

class Module(LightningModule):
    def __init__(self, width: int = 8, rate: float = 1e-3) -> None:
        super().__init__()

class Data(LightningDataModule):
    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()

sys.argv = ["plain", "fit", "--print_config"]
LightningCLI(Module, Data)
"""
PRINT = ["--model.encoder", "FlatPixels", "--model.objective", "Classify", "--data", "Digits", "--print_config"]
ARMS = {
    "python -c pass": ["-c", "pass"],
    "quire plugins": ["-m", "quire", "plugins"],
    "quire components": ["-m", "quire", "components"],
    "import torch": ["-c", "import torch"],
    "plain LightningCLI, fit --print_config": ["-c", PLAIN],
    "lightning fit --print_config": ["-m", "quire", "fit", *PRINT],
}


def user_seconds(arguments: list[str]) -> float:
    """User CPU of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def main(repeats: int = 5) -> None:
    """Print the table; processes take turns after one warm-up round."""
    spent: dict[str, list[float]] = {name: [] for name in ARMS}
    for turn in range(repeats + 1):
        for name, arguments in ARMS.items():
            seconds = user_seconds(arguments)
            if turn:
                spent[name].append(seconds)
    rows = [["", "user CPU, s"]] + [[name, f"{median(t):.2f} ({min(t):.2f})"] for name, t in spent.items()]
    full, plain = spent["lightning fit --print_config"], spent["plain LightningCLI, fit --print_config"]
    rows.append(["ratio of the last two", f"{median(full) / median(plain):.2f} ({min(full) / min(plain):.2f})"])
    table("Start-up (aim: quire plugins at most 0.25 s, ratio at most 1.3); median (minimum)", rows)


if __name__ == "__main__":
    main()
