"""SparseCard in runs: files beside the log, members of a bank, one and two processes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from quire.__main__ import execute
from quire.datasets.activations.module import Activations
from quire.errors import ConfigError
from quire.roles.sparse.bank import DictionaryBank
from quire.roles.sparse.card import Card
from quire.roles.sparse.watching import SparseCard

TINY = Activations.tiny()
TRAINER: dict[str, Any] = {
    "max_steps": 2,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 1,
    "callbacks": [{"class_path": "SparseCard", "init_args": {"tokens": 256}}],
}
RUN: dict[str, Any] = {"seed_everything": 3, **copy.deepcopy(TINY), "trainer": TRAINER}


def fitted(folder: Path, monkeypatch: Any, run: dict[str, Any], name: str = "one") -> Path:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(run))
    monkeypatch.chdir(folder)
    assert execute(["fit", "-c", f"{name}.yaml"]) == 0
    return folder / "runs" / name / "version_0"


def test_a_run_leaves_its_card_beside_its_log(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    folder = fitted(tmp_path, monkeypatch, RUN)
    card = Card.read(folder / "card.json")
    assert card.name == "TopK" and card.seed == 3 and card.about["tokens"] == 256 and card.about["step"] == 2
    assert card.about["site"] == "blocks.1.resid" and card.about["split"] == "val"
    assert {"delta_ce", "recovered_zero", "recovered_mean", "kl", "coherence"} <= set(card.numbers)
    assert "dead_training" not in card.numbers  # too few tokens were trained for its window
    assert f"card: l0 {card['l0']:.4g}, fvu {card['fvu']:.4g}" in capsys.readouterr().out
    assert (folder / "card.md").is_file() and (folder / "card.png").is_file()


def test_the_card_changes_nothing_in_the_run(tmp_path: Path, monkeypatch: Any) -> None:
    import torch

    from quire import load

    watched = {**RUN, "trainer": {**TRAINER, "max_steps": 5, "val_check_interval": 2, "check_val_every_n_epoch": None}}
    watched["trainer"]["callbacks"] = [{"class_path": "SparseCard", "init_args": {"tokens": 64, "every": 1}}]
    alone = {**watched, "trainer": {**watched["trainer"], "callbacks": []}}
    kept = [
        load(next(fitted(tmp_path, monkeypatch, run, name).rglob("*.ckpt"))).state_dict()
        for name, run in (("watched", watched), ("alone", alone))
    ]
    assert all(torch.equal(v, kept[1][k]) for k, v in kept[0].items())


def test_a_bank_gets_a_card_a_member_and_their_pareto_plot(tmp_path: Path, monkeypatch: Any) -> None:
    bank = DictionaryBank.tiny()["model"]
    folder = fitted(tmp_path, monkeypatch, {**RUN, "model": bank}, "bank")
    cards = [Card.read(folder / f"card-{i}.json") for i in (0, 1)]
    assert cards[0]["l0_max"] <= 1 and cards[1]["l0_max"] == 2
    assert (folder / "pareto.png").is_file() and not (folder / "card.json").exists()
    assert execute(["report", str(folder), "--member", "1", "--latents", "3", "--tokens", "200"]) == 0
    assert "TopK, k = 2" in (folder / "report.html").read_text()
    assert execute(["report", str(folder), "--member", "2"]) == 2


def test_oracle_4_two_processes_have_the_card_of_one(tmp_path: Path, monkeypatch: Any) -> None:
    run = copy.deepcopy(RUN)
    run["data"]["init_args"]["contexts"] = 4
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(run))
    folder = fitted(tmp_path, monkeypatch, run)
    checkpoint = str(next(folder.rglob("last.ckpt")))
    command = [
        str(Path(sys.executable).with_name("lightning")),
        "validate",
        "-c",
        "two.yaml",
        "--ckpt_path",
        checkpoint,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = subprocess.run([*command, *two], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert execute(["validate", "-c", "two.yaml", "--ckpt_path", checkpoint]) == 0
    cards = [Card.read(f) for f in sorted((tmp_path / "runs" / "two").rglob("card.json"))]
    assert len(cards) == 2
    both, one = cards
    assert both.about["tokens"] == one.about["tokens"] == 256
    assert both.density == one.density and both.about["targets"] == one.about["targets"]
    for name, value in one.numbers.items():
        assert both[name] == pytest.approx(value, rel=1e-6, abs=1e-7, nan_ok=True), name


def test_bad_input_is_refused(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    with pytest.raises(ConfigError, match=r"SparseCard\.tokens must be at least 1, got 0"):
        SparseCard(tokens=0)
    vit = {"class_path": "ViTEncoder", "init_args": {"patch": 2, "width": 8, "depth": 1, "heads": 1}}
    run = {**RUN, "model": {"encoder": vit, "objective": "Classify"}, "data": "Digits"}
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(run))
    monkeypatch.chdir(tmp_path)
    assert execute(["fit", "-c", "wrong.yaml"]) == 2
    assert "SparseCard" in capsys.readouterr().err


def test_a_metric_of_the_model_that_is_a_card_row_is_found() -> None:
    import torch
    from tests.sparse.toys import model_of

    from quire.contracts import Metric
    from quire.datasets.planted import PlantedFeatures
    from quire.roles.probes.subject import Subject
    from quire.roles.sparse.card import CardRow

    class Tokens(Metric, CardRow):
        def update(self) -> None:
            pass

        def compute(self) -> torch.Tensor:
            return torch.zeros(())

        def card_begin(self) -> None:
            self.count = 0

        def card_see(self, seen: Any) -> None:
            self.count += len(seen.x)

        def card_rows(self) -> dict[str, float]:
            return {"counted": float(self.count)}

    model = model_of(dtype=torch.float32, width=16)
    model.metrics.append(Tokens())
    subject = Subject(model.encoder, PlantedFeatures(width=16, samples=800), torch.device("cpu"), model)
    for _ in range(2):
        assert SparseCard(tokens=70).measure(subject, "val")["/counted"] == 70
