"""Every recipe of configs/mixes trains: its loss falls, and where it has a sampler or codes it predicts."""

from __future__ import annotations

import csv
import shlex
from pathlib import Path

import pytest
import yaml

from quire.__main__ import execute
from quire.data import expand
from quire.plugins import load

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "mixes"
RECIPES = sorted(FOLDER.glob("*.yaml"))


def named(value: object) -> set[str]:
    """Every scalar of a config."""
    if isinstance(value, dict):
        return set().union(*map(named, value.values()))
    if isinstance(value, list):
        return set().union(*map(named, value))
    return {str(value)}


def before(recipe: Path) -> list[list[str]]:
    """The commands that must have run, such as a pretraining: lines ``# first: lightning fit …``."""
    lines = (line.partition("# first: ") for line in recipe.read_text(encoding="utf-8").splitlines())
    words = [shlex.split(command)[1:] for start, mark, command in lines if mark and not start]
    return [[str(ROOT / word) if word.startswith("configs/") else word for word in command] for command in words]


def losses(folder: Path) -> list[float]:
    """The training losses that a run has logged, in order."""
    (file,) = folder.rglob("metrics.csv")
    with file.open(encoding="utf-8") as handle:
        return [float(row["train/loss"]) for row in csv.DictReader(handle) if row.get("train/loss")]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_first_line_says_who_would_want_it(recipe: Path) -> None:
    first = recipe.read_text(encoding="utf-8").partition("\n")[0]
    assert first.startswith("# ") and len(first.split()) > 8


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_mixes_parts_of_several_plugins(recipe: Path) -> None:
    entries = load().registry.entries
    plugins = {entries[word].plugin for word in named(yaml.safe_load(recipe.read_text())) if word in entries}
    assert len(plugins) >= 2, plugins


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_loss_falls_and_the_model_predicts(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = yaml.safe_load(recipe.read_text())
    for word in named(content):
        if word.startswith("$QUIRE_DATA/") and not expand(word).exists():
            pytest.skip(f"needs {word}, which is not here")
    monkeypatch.chdir(tmp_path)
    for command in before(recipe):
        assert execute(command) == 0, command
    assert execute(["fit", "-c", str(recipe)]) == 0
    found = losses(tmp_path / "runs" / recipe.stem)
    assert len(found) >= 4, "log more often: trainer.log_every_n_steps"
    assert sum(found[-2:]) < sum(found[:2])
    if content["model"].get("sampler") or content["model"].get("encoder"):
        assert execute(["predict", "-c", str(recipe), "--ckpt_path", "last"]) == 0
        assert list(tmp_path.rglob("predictions.*"))
