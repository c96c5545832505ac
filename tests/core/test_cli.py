from __future__ import annotations

import csv
import json

import pytest
import yaml

from quire.__main__ import execute

SMALL = {
    "model": {
        "encoder": {"class_path": "MlpVectorEncoder", "init_args": {"widths": [16], "code": 4}},
        "decoder": {"class_path": "MlpVectorDecoder", "init_args": {"widths": [16]}},
        "objective": "Reconstruction",
    },
    "data": {"class_path": "Digits", "init_args": {"batch_size": 128}},
    "trainer": {"max_steps": 3, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A config file in an empty folder that is the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    return "small.yaml"


def test_fit_leaves_metrics_config_and_a_checkpoint_in_a_run_folder(small, tmp_path):
    assert execute(["fit", "-c", small]) == 0
    folder = tmp_path / "runs/small/version_0"
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert {"train/loss", "step"} <= set(rows[0])
    assert (folder / "checkpoints/last.ckpt").is_file()
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["model"]["encoder"]["init_args"]["code"] == 4


def test_the_saved_config_runs_again_and_versions_count_up(small, tmp_path):
    execute(["fit", "-c", small])
    assert execute(["fit", "-c", "runs/small/version_0/config.yaml", "--trainer.max_steps", "1"]) == 0
    assert execute(["fit", "-c", small]) == 0
    assert (tmp_path / "runs/small/version_1").is_dir()


def test_resume_from_last_goes_on_from_the_newest_checkpoint(small, tmp_path):
    execute(["fit", "-c", small])
    assert execute(["fit", "-c", small, "--ckpt_path", "last", "--trainer.max_steps", "5"]) == 0
    rows = list(csv.DictReader((tmp_path / "runs/small/version_1/metrics.csv").open()))
    assert [int(r["step"]) for r in rows if r["train/loss"]] == [3, 4]


def test_resume_from_last_without_a_checkpoint_says_so(small, capsys):
    assert execute(["fit", "-c", small, "--ckpt_path", "last"]) == 2
    assert "no checkpoint under runs/small" in capsys.readouterr().err


def test_predict_writes_codes_in_index_order(small, tmp_path):
    from safetensors.torch import load_file

    execute(["fit", "-c", small])
    assert execute(["predict", "-c", small, "--ckpt_path", "last"]) == 0
    (file,) = tmp_path.glob("runs/small/version_*/predictions.safetensors")
    assert load_file(file)["vector"].shape == (397, 4)


def test_shorthands_and_command_line_overrides(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [
        "fit",
        "--model.encoder",
        "FlatPixels",
        "--model.objective",
        "Classify",
        "--data",
        "Digits",
        "--print_config",
    ]
    assert execute([*argv, "--model.objective.label_smoothing", "0.1"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["objective"]["init_args"]["label_smoothing"] == 0.1
    assert config["data"]["class_path"].endswith("Digits")


def test_later_configs_merge_over_earlier_ones(small, tmp_path, capsys):
    (tmp_path / "more.yaml").write_text("model: {encoder: {init_args: {code: 7}}}")
    assert execute(["fit", "-c", small, "-c", "more.yaml", "--print_config"]) == 0
    encoder = yaml.safe_load(capsys.readouterr().out)["model"]["encoder"]
    assert encoder["init_args"]["code"] == 7
    assert encoder["init_args"]["widths"] == [16]


def test_components_that_are_not_named_are_not_imported(small, monkeypatch):
    from quire.registry import Entry

    loaded, load = set(), Entry.load  # not sys.modules: other tests of this process import what they like
    monkeypatch.setattr(Entry, "load", lambda entry: (loaded.add(entry.name), load(entry))[1])
    assert execute(["fit", "-c", small, "--trainer.max_steps", "1"]) == 0
    assert loaded == {"MlpVectorEncoder", "MlpVectorDecoder", "Reconstruction", "Digits"}


def test_a_component_by_name_shows_its_whole_docstring_and_where_its_defaults_are(capsys):
    assert execute(["components", "PositionPrediction"]) == 0
    said = capsys.readouterr().out
    assert "Args:" in said and "Needs:" in said
    assert "lightning fit --model.objective.help=PositionPrediction" in said


def test_help_and_version(capsys):
    assert execute([]) == 0
    assert "reproduce" in capsys.readouterr().out
    assert execute(["--version"]) == 0
    assert execute(["fit", "--help"]) == 0


def test_json_is_for_programs(capsys):
    for command in ("plugins", "components", "configs"):
        assert execute([command, "--json"]) == 0
        json.loads(capsys.readouterr().out)


def test_a_trace_is_shown_on_request(small, monkeypatch):
    monkeypatch.setenv("QUIRE_TRACE", "1")
    with pytest.raises(Exception, match="no checkpoint"):
        execute(["fit", "-c", small, "--ckpt_path", "last"])


def test_a_size_that_is_text_stays_text_on_its_way_to_the_model(small, monkeypatch):
    from quire.datasets.images import Digits
    from quire.model import Model

    sizes, seen = Digits.sizes, []
    monkeypatch.setattr(Digits, "sizes", lambda self: {**sizes(self), "tokenizer": "799368409360"})
    monkeypatch.setattr(Model, "setup", lambda self, stage: seen.append(self.spec["tokenizer"]))
    execute(["fit", "-c", small])
    assert seen == ["799368409360"]  # not a number
