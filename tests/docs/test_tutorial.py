"""The tutorial is followed line by line: its files are written and its commands run, in the page's order."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.docs.blocks import ROOT, Block, blocks

PAGE = ROOT / "docs" / "tutorial.md"
INSTALL = "pip install -e barlow-twins"
STEPS = [b for b in blocks(PAGE) if b.title or b.language == "sh"]
# one process follows everything after the installation, so that torch is imported once
FOLLOW = """
import json, runpy, shlex, sys
from pathlib import Path
from quire.__main__ import execute

for title, text in json.load(sys.stdin):
    if title:
        Path(title).write_text(text, encoding="utf-8")
        continue
    print("$", text, flush=True)
    program, *words = shlex.split(text)
    if program == "python":
        runpy.run_path(words[0])
    elif program == "pytest":
        import pytest
        assert pytest.main([*words, "-p", "no:cacheprovider"]) == 0, text
    else:
        assert program in ("quire", "lightning") and execute(words) == 0, text
"""


def steps(found: Sequence[Block]) -> list[tuple[str, str]]:
    """(title, text) of a file, ("", line) of a command."""
    made: list[tuple[str, str]] = []
    for block in found:
        made += [(block.title, block.text)] if block.title else [("", line) for line in block.text.splitlines() if line]
    return made


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the page was followed, and all that was printed."""
    folder = tmp_path_factory.mktemp("walk")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "PL_", "QUIRE_"))}
    environment = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder / "site"), "QUIRE_CACHE": str(folder)}

    def run(*command: str, say: str = "") -> str:
        start = [sys.executable, *command]
        done = subprocess.run(
            start, cwd=folder, env=environment, input=say, capture_output=True, text=True, timeout=1500, check=False
        )
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    shown = steps(STEPS)
    at = shown.index(("", INSTALL))
    run("-c", FOLLOW, say=json.dumps(shown[:at]))
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--target", "site"]
    run("-m", "pip", "install", "-q", *offline, "./barlow-twins")
    return folder, run("-c", FOLLOW, say=json.dumps(shown[at + 1 :]))


def last(folder: Path, column: str) -> list[float]:
    """A logged column of the mixed run."""
    with (folder / "runs/mixed/version_0/metrics.csv").open(encoding="utf-8") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def test_every_command_of_the_page_ends_well_and_says_what_the_page_says(walk: tuple[Path, str]) -> None:
    folder, said = walk
    assert "passed" in said and "failed" not in said
    assert "Types and defaults: lightning fit --model.objective.help=BarlowTwins" in said
    assert "ViTEncoder ['BarlowTwins', 'PositionPrediction']" in said
    assert "class_path: Sum" in said
    assert (folder / "runs/barlow-twins/tiny/version_0/checkpoints/last.ckpt").is_file()
    assert "MultiModalViT" in (folder / "multimodal.yaml").read_text(encoding="utf-8")


def test_both_terms_of_the_mix_fall(walk: tuple[Path, str]) -> None:
    for term in ("val/invariance", "val/position"):
        found = last(walk[0], term)
        assert found[-1] < found[0], term


def test_the_probe_finds_more_in_the_trained_encoder_than_in_an_untrained_one(walk: tuple[Path, str]) -> None:
    rows = [line.split() for line in walk[1].rpartition("$ quire probe")[2].splitlines() if line.startswith("knn")]
    accuracy = {row[1]: float(row[3]) for row in rows}
    assert accuracy["encoder"] > accuracy["random"] > accuracy["majority"]


def test_the_package_has_no_lint(walk: tuple[Path, str]) -> None:
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", walk[0] / "barlow-twins"]
        done = subprocess.run(ruff, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
