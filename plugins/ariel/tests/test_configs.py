"""The shipped YAML says what it is, parses, and leaves a report."""

import json

import pytest

from quire.__main__ import execute
from quire.plugins import load

NAMES = ("grammar", "shakespeare", "scan", "captions", "full", "hf")


def test_every_config_is_shipped_and_says_what_it_is():
    shipped = {n for n in load().configs() if n.startswith("ariel/")}
    assert shipped == {f"ariel/{n}" for n in NAMES}
    for name in shipped:
        first = load().configs()[name].read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# ") and len(first) > 40 and ("(parse only)" in first) == name.endswith(("full", "hf"))


@pytest.mark.parametrize("name", ["shakespeare", "scan", "captions"])
def test_configs_of_real_data_parse_without_it(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QUIRE_DATA", str(tmp_path))
    assert execute(["fit", "-c", f"ariel/{name}", "--print_config"]) == 0
    assert "VolumeDecoder" in capsys.readouterr().out


@pytest.mark.slow
def test_fit_test_and_predict_of_the_embedded_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quiet = ["--trainer.enable_progress_bar", "false"]
    assert execute(["fit", "-c", "ariel/grammar", *quiet]) == 0
    assert execute(["predict", "-c", "ariel/grammar", "--ckpt_path", "last", *quiet]) == 0
    fitted, predicted = (tmp_path / "runs" / "ariel" / "grammar" / f"version_{i}" for i in range(2))
    assert (fitted / "cube" / "cube.png").is_file() and (fitted / "cube" / "points-0002.txt").is_file()
    rows = [json.loads(line) for line in (predicted / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 1000 and {"index", "tokens", "text", "z", "log2_volume"} <= set(rows[0])
    found = json.loads((predicted / "metrics.json").read_text())
    assert found["Uniqueness"] > 0.5
