"""What the plugin ships, through the console script, and the pictures that a run leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from quire.__main__ import execute
from quire.plugins import load

CONFIGS = {name: path for name, path in load().configs().items() if name.startswith("multimae/")}


def test_every_scale_is_shipped_with_a_first_line_that_says_what_it_is():
    names = {n.partition("/")[2] for n in CONFIGS}
    assert names == {"digits", "finetune_digits", "mnist", "stereo", "shapes", "skimage", "vit_b"}
    assert all(path.read_text(encoding="utf-8").startswith("# ") for path in CONFIGS.values())


def test_the_reference_scale_parses_without_its_data(capsys):
    assert execute(["fit", "-c", "multimae/vit_b", "--print_config"]) == 0
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert model["objective"]["init_args"]["masking"]["init_args"]["visible"] == 98


def test_pretraining_draws_every_modality_then_fine_tunes_from_another_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=2"]
    slim = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    assert execute(["fit", "-c", "multimae/digits", *few, *slim]) == 0
    said = capsys.readouterr().out
    assert "modalities.png" in said and "from_edges.png" in said
    (checkpoint,) = Path("runs/multimae/digits/version_0/checkpoints").glob("last.ckpt")
    path = f"--model.encoder.init_args.path={checkpoint}"
    assert execute(["fit", "-c", "multimae/finetune_digits", path, *few, *slim]) == 0


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--model.objective.init_args.masking.init_args.visible=700", "visible=700 exceeds the 48 tokens available"),
        ("--model.objective.init_args.masking.init_args.alpha=0.0", "alpha must be > 0, got 0.0"),
    ],
)
def test_a_wrong_mask_is_one_sentence(option, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert execute(["fit", "-c", "multimae/digits", option, "--trainer.max_steps=1"]) == 2
    assert said in capsys.readouterr().err
