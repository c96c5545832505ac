"""Other projects on the same task, each in a virtual environment of its own under ``.peers/`` (git-ignored).

They see this environment's torch and timm, so that only their own code differs.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(name: str, *packages: str) -> str:
    """Python of ``.peers/NAME``, made and filled at the first call."""
    folder = ROOT / ".peers" / name
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        site = next((folder / "lib").glob("python*/site-packages"))
        (site / "ours.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
        (folder / "ready").touch()
    return str(python)


def lightly() -> list[str]:
    """The command of lightly's arm."""
    return [environment("lightly", "lightly==1.6.0"), "-m", "tests.benchmarks.peer_lightly"]


COMMANDS: dict[str, Callable[[], list[str]]] = {"lightly 1.6.0": lightly}


def sparse(peer: str, *packages: str) -> Callable[[], list[str]]:
    """The command of a dictionary project's arm."""
    return lambda: [environment(peer, *packages), "-m", "tests.benchmarks.peer_sparse", peer]


SAELENS = "sae-lens==6.54.12"

SPARSE: dict[str, Callable[[], list[str]]] = {
    "sparsify 1.3.3": sparse("sparsify", "eai-sparsify==1.3.3"),
    "dictionary_learning 0.1.0": sparse("dictionary_learning", "--no-deps", "dictionary-learning==0.1.0", "einops"),
    "SAELens 6.54.12": sparse("sae_lens", SAELENS),
}

RUNNERS: dict[str, Callable[[], list[str]]] = {
    "SAELens 6.54.12, its runner": lambda: [environment("sae_lens", SAELENS), "-m", "tests.benchmarks.peer_runs"]
}
"""Other projects' own training of a dictionary on a language model, from tokens to weights."""
