"""What the plugin ships, through the console script."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml

from quire.__main__ import execute
from quire.plugins import load

CONFIGS = {name: path for name, path in load().configs().items() if name.startswith("dupmae/")}
SLIM = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def test_every_scale_is_shipped_with_a_first_line_that_says_what_it_is():
    names = {n.partition("/")[2] for n in CONFIGS}
    assert names == {
        *("stdlib", "tune_stdlib", "cranfield", "tune_cranfield", "gutenberg", "bert_base", "tune_bert_base"),
    }
    for path in CONFIGS.values():
        assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("name", ["dupmae/bert_base", "dupmae/tune_bert_base"])
def test_paper_scale_parses_without_its_data(name, capsys):
    assert execute(["fit", "-c", name, "--print_config"]) == 0
    said = yaml.safe_load(capsys.readouterr().out)["model"]
    assert said["encoder"]["init_args"]["name_or_config"] == "bert-base-uncased"


def test_pretraining_search_tuning_and_search_again_from_another_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=1"]
    less = ["--data.init_args.limit=120"]
    assert execute(["fit", "-c", "dupmae/stdlib", *few, *SLIM, *less]) == 0
    said = capsys.readouterr().out
    assert "terms.png" in said and "strongest terms are in their text" in said
    assert execute(["predict", "-c", "dupmae/stdlib", "--ckpt_path=last", *SLIM, *less]) == 0
    capsys.readouterr()
    (rows,) = Path("runs/dupmae/stdlib").rglob("predictions.jsonl")
    first = json.loads(rows.read_text().splitlines()[0])
    assert len(first["documents"]) == 100
    assert np.load(rows.parent / "index" / "dense.npy").shape == (120, 0)  # this config searches by terms
    told = json.loads((rows.parent / "metrics.json").read_text())
    assert set(told) == {"MRR", "NDCG", "RecallAtK"} and 0 <= told["MRR"] <= told["RecallAtK"] <= 1
    assert execute(["fit", "-c", "dupmae/tune_stdlib", *few, *SLIM, *less]) == 0
    assert execute(["predict", "-c", "dupmae/tune_stdlib", "--ckpt_path=last", *SLIM, *less]) == 0
    (rows,) = Path("runs/dupmae/tune_stdlib").rglob("predictions.jsonl")
    assert np.load(rows.parent / "index" / "dense.npy").shape == (120, 64)


def test_a_wrong_ratio_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = execute(["fit", "-c", "dupmae/stdlib", "--model.objective.init_args.masking=1.0"])
    assert code == 2
    assert "mask_ratio must be in (0,1), got 1.0" in capsys.readouterr().err


def test_cranfield_has_its_180_test_queries():
    if not os.environ.get("QUIRE_DATA") or not Path(os.environ["QUIRE_DATA"], "cranfield").is_dir():
        pytest.skip("QUIRE_DATA does not point at a folder with cranfield")
    from quire_dupmae import bm25
    from quire_dupmae.beir import BeirFolder
    from quire_dupmae.claim import judge

    data = BeirFolder("$QUIRE_DATA/cranfield", drop_empty=True)
    found = data.collection
    assert len(found.names) == 1398 and {k: len(v) for k, v in found.splits.items()}["test"] == 180
    told = judge(data, bm25.rank(found.texts, [q.text for q in found.splits["test"]], 100))
    assert told["MRR@10 %"] > 40 and told["recall@100 %"] > 60  # a wrong reading of ids or grades would not
