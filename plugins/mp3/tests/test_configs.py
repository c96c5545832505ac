"""What the plugin ships, through the console script."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from quire.__main__ import execute
from quire.plugins import load
from quire_mp3.modules import TINY

CONFIGS = {name: path for name, path in load().configs().items() if name.startswith("mp3/")}


def test_every_scale_is_shipped_with_a_first_line_that_says_what_it_is():
    names = {n.partition("/")[2] for n in CONFIGS}
    assert names == {
        "digits",
        "finetune_digits",
        "speech_tones",
        "fsdd",
        "mnist",
        "vit_s_cifar",
        "vit_b_imagenet",
    }
    for path in CONFIGS.values():
        assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_pretraining_configs_take_the_encoder_s_positions_away(name):
    model = yaml.safe_load(CONFIGS[name].read_text(encoding="utf-8"))["model"]
    if name != "mp3/finetune_digits":
        assert model["encoder"]["init_args"]["positions"] == "none"


@pytest.mark.parametrize("name", ["mp3/vit_s_cifar", "mp3/vit_b_imagenet"])
def test_paper_scale_parses_without_its_data(name, capsys):
    assert execute(["fit", "-c", name, "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["objective"]["class_path"].endswith("PositionPrediction")


def test_pretraining_then_fine_tuning_from_another_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=2"]
    slim = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    assert execute(["fit", "-c", "mp3/digits", *few, *slim]) == 0
    assert "put_back.png" in capsys.readouterr().out
    (checkpoint,) = Path("runs/mp3/digits/version_0/checkpoints").glob("last.ckpt")
    path = f"--model.encoder.init_args.path={checkpoint}"
    assert execute(["fit", "-c", "mp3/finetune_digits", path, *few, *slim]) == 0
    assert execute(["test", "-c", "mp3/finetune_digits", path, "--ckpt_path=last", *slim]) == 0
    assert "test/accuracy" in capsys.readouterr().out


def test_a_wrong_masking_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = execute(["fit", "-c", "mp3/digits", "--model.objective.init_args.masking=1.2"])
    assert code == 2
    assert "masking must be in [0,1), got 1.2" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["fsdd", "mnist"])
def test_real_data_trains(name, tmp_path, monkeypatch):
    if not Path(os.environ.get("QUIRE_DATA", ""), name).is_dir() or not os.environ.get("QUIRE_DATA"):
        pytest.skip(f"QUIRE_DATA does not point at a folder with {name}")
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"]
    assert execute(["fit", "-c", f"mp3/{name}", *short]) == 0


def test_the_tiny_example_is_a_whole_run():
    assert TINY["encoder"]["init_args"]["positions"] == "none"
