"""The shipped YAML: the paper's numbers where it says so, and what a run of the embedded one leaves behind."""

import csv
from itertools import pairwise

import pytest
import yaml

from quire.__main__ import execute
from quire.plugins import load

NAMES = (
    "digits_incremental",
    "toy_gaussians",
    "mnist_incremental",
    "mnist_other_keys",
    "omniglot_incremental",
    "full_ci_cifar10",
)


def config(name):
    return yaml.safe_load(load().configs()[f"dkvb/{name}"].read_text(encoding="utf-8"))


def test_every_config_is_shipped_and_says_what_it_is():
    shipped = {n for n in load().configs() if n.startswith("dkvb/")}
    assert shipped == {f"dkvb/{n}" for n in NAMES}
    for name in shipped:
        first = load().configs()[name].read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# ") and len(first) > 40


@pytest.mark.parametrize("name", NAMES)
def test_values_alone_move_and_the_epochs_are_the_streams(name):
    found = config(name)
    optimizer = found["model"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.SGD" and set(optimizer["init_args"]) == {"lr"}
    assert found["model"]["schedule"] == "Constant"
    stream = found["data"]["init_args"]
    assert found["trainer"]["max_epochs"] == stream["splits"] * stream["epochs_per_split"]
    assert found["trainer"]["check_val_every_n_epoch"] == stream["epochs_per_split"], "a row of the picture a split"


def test_the_paper_scale_is_the_codes():
    found = config("full_ci_cifar10")
    given = found["model"]["encoder"]["init_args"]
    assert (given["codebooks"], given["keys"], given["key_width"]) == (256, 4096, 14)
    assert found["model"]["objective"]["init_args"] == {"label_smoothing": 0.1}
    assert found["model"]["optimizer"]["init_args"] == {"lr": 0.3} and found["trainer"]["gradient_clip_val"] == 1.0
    stream = found["data"]["init_args"]
    assert (stream["splits"], stream["epochs_per_split"], stream["base"]["init_args"]["batch_size"]) == (5, 2000, 256)
    assert found["trainer"]["callbacks"][0]["init_args"]["data"]["init_args"]["name"] == "CIFAR100"


def test_fit_keeps_what_it_learnt_first_and_draws_the_stream(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ["--trainer.max_epochs", "10", "--trainer.check_val_every_n_epoch", "2", "--data.epochs_per_split", "2"]
    assert execute(["fit", "-c", "dkvb/digits_incremental", *quick, "--trainer.enable_progress_bar", "false"]) == 0
    folder = tmp_path / "runs" / "dkvb" / "digits_incremental" / "version_0"
    assert (folder / "stream.png").is_file()
    with (folder / "metrics.csv").open(encoding="utf-8") as handle:
        rows = [row for row in csv.DictReader(handle) if row["val/FinalAccuracy"]]
    final = [float(row["val/FinalAccuracy"]) for row in rows]
    assert len(final) == 5 and all(b > a for a, b in pairwise(final)) and final[-1] > 0.85
    assert float(rows[-1]["val/Forgetting"]) < 0.1


def test_the_toy_is_learnt_in_its_own_corners(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert execute(["fit", "-c", "dkvb/toy_gaussians", "--trainer.enable_progress_bar", "false"]) == 0
    with next(tmp_path.rglob("metrics.csv")).open(encoding="utf-8") as handle:
        rows = [row for row in csv.DictReader(handle) if row["val/FinalAccuracy"]]
    assert float(rows[-1]["val/FinalAccuracy"]) > 0.95 and float(rows[-1]["val/Forgetting"]) < 0.05
