"""The shipped YAML: what it says, and what a run of the embedded one leaves behind."""

import json

import pytest
import torch
import yaml

from quire.__main__ import execute
from quire.contracts import Spec, build
from quire.plugins import load
from quire.roles.latent.conv import ConvVectorDecoder, ConvVectorEncoder

NAMES = ("digits", "mnist", "omniglot", "fashion_900", "full_mnist", "full_fashion")


def config(name):
    return yaml.safe_load(load().configs()[f"prototypes/{name}"].read_text(encoding="utf-8"))


def test_every_config_is_shipped_and_says_what_it_is():
    shipped = {n for n in load().configs() if n.startswith("prototypes/")}
    assert shipped == {f"prototypes/{n}" for n in NAMES}
    for name in shipped:
        first = load().configs()[name].read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# ") and len(first) > 40


@pytest.mark.parametrize("name", NAMES)
def test_optimiser_and_weights_are_those_of_the_official_code(name):
    model = config(name)["model"]
    assert model["objective"]["init_args"] == {"classify": 20, "reconstruct": 1, "r1": 1, "r2": 1}
    assert model["optimizer"] == {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.002}}
    assert model["schedule"] == "Constant"


@pytest.mark.parametrize("name", ["full_mnist", "full_fashion"])
def test_the_paper_scale_is_the_papers(name):
    found = config(name)
    data = found["data"]["init_args"]
    assert found["trainer"]["max_epochs"] == 1500 and data["batch_size"] == 250 and data["val_samples"] == 5000
    assert data["transforms"] == [{"class_path": "ElasticDeformation", "init_args": {"sigma": 4, "alpha": 20, "p": 1}}]
    assert found["model"]["decoder"]["init_args"]["prototypes"] == 15


def test_the_papers_network_has_forty_features_and_mirrors_itself():
    given = config("mnist")["model"]
    encoder = ConvVectorEncoder(**given["encoder"]["init_args"])
    spec = Spec({"image_size": [28, 28], "channels": 1, "classes": 10})
    build(encoder, spec)
    decoder = ConvVectorDecoder(**given["decoder"]["init_args"]["decoder"]["init_args"])
    build(decoder, Spec({**spec, "codes": encoder.sizes()}))
    codes = encoder({"image": torch.rand(2, 1, 28, 28)})
    assert codes.vector.shape == (2, 40) and (codes.vector >= 0).all()
    assert decoder(codes).shape == (2, 1, 28, 28)


def test_fit_then_predict_explains_every_test_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ["--trainer.max_epochs", "2", "--trainer.enable_progress_bar", "false"]
    assert execute(["fit", "-c", "prototypes/digits", *quick]) == 0
    assert execute(["predict", "-c", "prototypes/digits", "--ckpt_path", "last", *quick]) == 0
    fitted, predicted = (tmp_path / "runs" / "prototypes" / "digits" / f"version_{i}" for i in range(2))
    assert (fitted / "prototypes" / "prototypes-0002.png").is_file()
    assert (predicted / "prototypes" / "explanations.png").is_file()
    rows = [json.loads(line) for line in (predicted / "predictions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(450))
    for row in rows:
        assert {"label", "prediction", "logit", "rest", "prototypes"} <= set(row)
        for case in row["prototypes"]:
            assert {"prototype", "distance", "weight", "contribution", "class", "nearest"} == set(case)
            assert 0 <= case["nearest"]["index"] < 1347 and 0 <= case["nearest"]["label"] < 10
        total = sum(case["contribution"] for case in row["prototypes"]) + row["rest"]
        assert total == pytest.approx(row["logit"], abs=1e-4)
