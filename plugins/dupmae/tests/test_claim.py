"""The claim's arithmetic and words, on made-up results; its training is run by ``quire reproduce dupmae``."""

from __future__ import annotations

import pytest
import torch

from quire.reproduce import verdict
from quire_dupmae import claim
from quire_dupmae.claim import ARMS, BM25, CLS, COLD, HYBRID, LEXICAL, MLM, TUNED, DuplexHelpsRetrieval


def results(lexical=10.0, control=2.0, hybrid=22.0, cls=20.0, mlm=15.0, seeds=3):
    """Arms whose seeds differ by a point, the paired ones in step."""

    def arm(cold, tuned):
        rest = {"nDCG@10 %": 1.0, "recall@100 %": 2.0}
        return {s: {COLD: cold, TUNED: tuned + s + (0.1 * s if cold else 0.0), **rest} for s in range(seeds)}

    made = {name: arm(1.0, 10.0) for name in ARMS}
    return {
        **made,
        **{HYBRID: arm(5.0, hybrid), CLS: arm(0.0, cls), LEXICAL: arm(lexical, 18.0), MLM: arm(control, mlm)},
        BM25: arm(30.0, 30.0),
    }


@pytest.mark.parametrize(
    ("made", "word", "remark"),
    [
        (results(), "reproduced", "DupMAE hybrid minus BM25, which learns nothing: -8.0 points"),
        (results(lexical=3.0), "not reproduced", "not reproduced: hybrid 23.1 ± 1.1, CLS 21.0 ± 1.0, MLM 16.1 ± 1.1"),
        (results(hybrid=19.0), "not reproduced", "not reproduced: hybrid 20.1"),
        (results(cls=15.0), "not reproduced", "not reproduced: "),
        (results(seeds=1), "inconclusive", "tuned MRR@10 %: random CLS 10.0"),
    ],
)
def test_the_verdict_and_its_remark(made, word, remark):
    asked = DuplexHelpsRetrieval()
    assert verdict(asked.bands(made)) == word
    assert any(r.startswith(remark) for r in asked.remarks(made))


def test_arms_of_one_kind_share_their_pretraining_but_not_the_tuned_weights(tmp_path, monkeypatch):
    made = []

    def pretrain(kind, data, steps, seed, folder):
        made.append((kind, steps, seed))
        return torch.nn.Linear(1, 1)

    seen = []
    monkeypatch.setattr(claim, "pretrain", pretrain)
    monkeypatch.setattr(claim, "tune", lambda model, *_: seen.append(model) or model)
    monkeypatch.setattr(claim, "search", lambda *_: [[0]])
    monkeypatch.setattr(claim, "judge", lambda *_: {"MRR@10 %": 50.0, "nDCG@10 %": 1.0, "recall@100 %": 2.0})
    asked = DuplexHelpsRetrieval()
    for arm, settings in ARMS.items():
        found = asked.run(arm, settings, 0, False, tmp_path)
        assert found[TUNED] == 50.0
    steps = ARMS[CLS]["pretraining"]
    assert made == [("duplex", steps, 0), *((k, steps, 0) for k in ("retro", "mlm", "bag")), ("none", 0, 0)]
    assert len({id(m) for m in seen}) == len(seen) == 7
    asked.run(CLS, ARMS[CLS], 1, True, tmp_path)
    assert made[-1] == ("duplex", steps // 50, 1)


def test_one_arm_runs_in_silence_from_pretraining_to_the_search(tmp_path, capsys):
    settings = {"kind": "duplex", "embedding": "hybrid", "pretraining": 100, "tuning": 100}
    found = DuplexHelpsRetrieval().run("tiny", settings, 0, True, tmp_path)
    assert set(found) == {COLD, TUNED, "nDCG@10 %", "recall@100 %"}
    assert all(0 <= v <= 100 for v in found.values())
    assert capsys.readouterr().out == ""
