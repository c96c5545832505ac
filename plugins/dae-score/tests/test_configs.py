"""The shipped YAML: what it says, and what a short run of the embedded one leaves behind."""

import json

import pytest
import yaml
from safetensors.torch import load_file

from quire.__main__ import execute
from quire.plugins import load

NAMES = ("toy", "pca_digits", "digits_pca", "mnist", "fashion_900", "full")


def config(name):
    return yaml.safe_load(load().configs()[f"dae-score/{name}"].read_text(encoding="utf-8"))


def test_every_config_is_shipped_and_says_what_it_is():
    shipped = {n for n in load().configs() if n.startswith("dae-score/")}
    assert shipped == {f"dae-score/{n}" for n in NAMES}
    for name in shipped:
        first = load().configs()[name].read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# ") and len(first) > 40


@pytest.mark.parametrize(("name", "sigma"), [("toy", 0.2), ("mnist", 0.3), ("full", [0.5, 0.3, 0.2, 0.1])])
def test_sigmas_are_those_of_the_spec(name, sigma):
    assert config(name)["model"]["objective"]["init_args"]["sigma"] == sigma


def test_the_paper_scale_starts_from_4096_images():
    found = config("full")
    assert found["data"]["init_args"]["batch_size"] * found["trainer"]["limit_predict_batches"] == 4096


def test_fit_then_predict_runs_the_chains_from_the_batch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ["--data.init_args.samples=512", "--trainer.enable_progress_bar", "false"]
    chains = ["--model.sampler.init_args.steps=40", "--model.sampler.init_args.burn_in=10"]
    assert execute(["fit", "-c", "dae-score/toy", "--trainer.max_steps=4", *quick, *chains]) == 0
    assert execute(["predict", "-c", "dae-score/toy", "--ckpt_path", "last", *quick, *chains]) == 0
    fitted, predicted = (tmp_path / "runs" / "dae-score" / "toy" / f"version_{i}" for i in range(2))
    assert (fitted / "field.png").is_file() and (predicted / "chains.png").is_file()
    found = load_file(predicted / "predictions.safetensors")
    assert found["samples"].shape == (64, 6, 2) and found["acceptance"].shape == (64,)
    assert set(json.loads((predicted / "metrics.json").read_text())) == {"GridKL", "MMD", "EffectiveSamples"}
