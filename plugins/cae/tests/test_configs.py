"""What the plugin ships, through the console script."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from quire.__main__ import execute
from quire.plugins import load

CONFIGS = {name: path for name, path in load().configs().items() if name.startswith("cae/")}
FEW = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"]


def test_every_scale_is_shipped_with_a_first_line_that_says_what_it_is():
    names = {n.partition("/")[2] for n in CONFIGS}
    assert names == {
        "digits",
        "digits_vq",
        "fashion",
        "kodak",
        "mnist",
        "tokenizer_digits",
        "vit_b",
        "vit_s_cifar",
    }
    assert all(path.read_text(encoding="utf-8").startswith("# ") for path in CONFIGS.values())


@pytest.mark.parametrize("name", ["cae/vit_b", "cae/vit_s_cifar"])
def test_large_scales_parse_without_their_data(name, capsys):
    assert execute(["fit", "-c", name, "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["objective"]["class_path"].endswith("ContextAutoencoding")


def test_digits_train_probe_and_draw(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fewer = ["--trainer.val_check_interval=2", "--data.init_args.train_samples=256"]
    assert execute(["fit", "-c", "cae/digits", *FEW, *fewer, "--trainer.enable_model_summary=false"]) == 0
    assert "of the masked tokens are right" in capsys.readouterr().out
    made = Path("runs/cae/digits/version_0")
    assert (made / "completed.png").is_file()
    assert (made / "checkpoints/last.ckpt").is_file()


def test_a_checkpoint_reloads_with_its_clusters_and_without_yaml(tmp_path, monkeypatch):
    import torch

    import quire

    monkeypatch.chdir(tmp_path)
    off = ["--trainer.enable_model_summary=false", "--model.objective.init_args.pictures=0"]
    fewer = ["--trainer.val_check_interval=2", "--data.init_args.train_samples=256", "--trainer.callbacks=[]"]
    assert execute(["fit", "-c", "cae/digits", *FEW, *fewer, *off]) == 0
    model = quire.load("runs/cae/digits/version_0/checkpoints/last.ckpt")
    assert bool(model.objective.target.fitted)
    assert set(model.objective(model, {"image": torch.rand(2, 1, 8, 8)})) == {"reconstruct", "align"}


def test_wrong_values_are_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    block = "--model.objective.init_args.masking.init_args.min_block=16"
    assert execute(["fit", "-c", "cae/digits", *FEW, block]) == 2
    assert "min_block=16 exceeds the 8 cells to mask" in capsys.readouterr().err
    path = f"--model.objective.init_args.target.init_args.path={tmp_path}/none.safetensors"
    own = ["--model.objective.init_args.target=DalleTokenizer", path]
    assert execute(["fit", "-c", "cae/digits", *FEW, *own]) == 2
    assert "make it once with: quire cae-tokenizer" in capsys.readouterr().err
