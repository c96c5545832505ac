"""``quire probe``: all probes on a checkpoint's frozen encoder, and its complaints."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from quire import Model
from quire.__main__ import execute
from quire.datasets.images import Digits
from quire.roles.latent.mlp import MlpVectorEncoder
from quire.roles.probes.classify import Classify
from quire.roles.probes.command import main
from quire.roles.tokens.vit import ViTEncoder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints of a small ViT and of an MLP, one epoch each."""
    made = {}
    for name, encoder in (("vit", ViTEncoder(patch=4, width=16, depth=1, heads=2)), ("mlp", MlpVectorEncoder())):
        folder = tmp_path_factory.mktemp(name)
        pl.seed_everything(0)
        run = pl.Trainer(
            default_root_dir=folder, accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False
        )
        run.fit(Model(encoder=encoder, objective=Classify()), datamodule=Digits())
        made[name] = run.checkpoint_callback.best_model_path
    return made


def test_every_probe_runs_on_a_checkpoint_and_the_table_is_printed_and_written(checkpoints, tmp_path, capsys):
    arguments = [checkpoints["vit"], "--data", "Digits", "--data.train_samples", "300", "--folder", str(tmp_path)]
    assert execute(["probe", *arguments]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("knn", "linear", "attentive", "random", "raw", "majority", "effective rank"))
    rows = json.loads((tmp_path / "probes.json").read_text())
    assert [(r["probe"], r["features"]) for r in rows][:4] == [
        ("knn", "encoder"), ("knn", "random"), ("knn", "raw"), ("knn", "majority"),
    ]  # fmt: skip
    assert len(rows) == 12 and {r["split"] for r in rows} == {"test"} and {r["samples"] for r in rows} == {397}
    assert {r["train_samples"] for r in rows} == {300}
    assert (tmp_path / "probes.csv").is_file() and (tmp_path / "health.png").is_file()


def test_a_probe_that_cannot_judge_the_encoder_is_left_out_with_its_reason(checkpoints, capsys):
    assert main([checkpoints["mlp"], "--data", "Digits", "--probes", "knn,attentive", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {r["probe"] for r in found["rows"]} == {"knn"}
    assert found["skipped"]["attentive"].startswith("AttentiveProbe needs a TokenEncoder")
    raw = next(r for r in found["rows"] if r["features"] == "raw")
    assert raw["accuracy"] == pytest.approx(0.97, abs=0.01)  # role-tokens 6 [V]


def test_the_checkpoint_is_not_changed(checkpoints, tmp_path):
    before = Path(checkpoints["vit"]).read_bytes()
    main([checkpoints["vit"], "--data", "Digits", "--probes", "linear", "--folder", str(tmp_path)])
    assert before == Path(checkpoints["vit"]).read_bytes()


def test_the_same_command_gives_the_same_numbers(checkpoints, tmp_path):
    for name in ("a", "b"):
        torch.rand(3)
        main([checkpoints["vit"], "--data", "Digits", "--max-train", "60", "--folder", str(tmp_path / name)])
    assert (tmp_path / "a/probes.json").read_text() == (tmp_path / "b/probes.json").read_text()
    assert (tmp_path / "a/health.json").read_text() == (tmp_path / "b/health.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.ckpt", "--data", "Digits"], "no checkpoint at none.ckpt"),
        (["CKPT"], "quire probe needs data: add --data NAME"),
        (["CKPT", "--data", "Digit"], "no installed component is named Digit; did you mean Digits"),
        (["CKPT", "--data", "Digits", "--data.batchsize", "3"], "there is no"),
        (["CKPT", "--data", "Digits", "--data.batch_size", "0"], "data.batch_size must be at least 1, got 0"),
        (["CKPT", "--data", "Digits", "--probes", "knm"], "no probe is named knm; did you mean knn"),
        (["CKPT", "--data", "Digits", "--max-train", "0"], "--max-train must be at least 1, got 0"),
        (["CKPT", "--data", "Digits", "--device", "warp"], "--device warp can't be used here"),
        (["CKPT", "--data", "Digits", "--pooling", "class"], "KNNProbe.pooling is class, but the encoder has no class"),
        (["CKPT", "--data", "SpeechTones"], "ViTEncoder reads the field image; SpeechTones offers"),
        (["CKPT", "--data", "Digits", "--data.channels", "3"], "image has 3 channels, ViTEncoder was built for 1"),
    ],
)
def test_a_complaint_is_one_sentence_with_the_remedy(checkpoints, capsys, arguments, said):
    assert execute(["probe", *(checkpoints["vit"] if a == "CKPT" else a for a in arguments)]) in (1, 2)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and said in line
