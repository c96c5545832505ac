"""The claim's arithmetic and words, on made-up results; its training is run by ``quire reproduce mp3``."""

from __future__ import annotations

import pytest

from quire.reproduce import verdict
from quire_mp3 import claim
from quire_mp3.claim import BARE, BARE_FULL, LATE_MP3, LATE_SCRATCH, MP3, PLACE, SCRATCH, TEST, PretrainingHelps


def results(mp3, scratch, bare=60.0, late=0.0, place=37.0, seeds=3):
    """Arms whose seeds differ by one point each, in opposite directions for the paired ones."""

    def arm(mean, **more):
        return {s: {TEST: mean + (s - (seeds - 1) / 2), **more} for s in range(seeds)}

    return {
        MP3: arm(mp3, **{PLACE: place}),
        BARE: arm(bare),
        BARE_FULL: arm(58.0),
        SCRATCH: arm(scratch),
        LATE_MP3: arm(78.0 + late),
        LATE_SCRATCH: arm(78.0),
    }


@pytest.mark.parametrize(
    ("made", "word", "remark"),
    [
        (
            results(74, 46),
            "reproduced",
            "reproduced at a short fine-tuning budget (200 steps); at 900 steps no advantage",
        ),
        (results(74, 46, late=5), "reproduced", "at 900 steps an advantage: +5.0"),
        (results(74, 70), "not reproduced", "not reproduced: MP3 74.0 ± 1.0, scratch 70.0 ± 1.0, needed +8.0"),
        (results(74, 46, bare=40), "not reproduced", "not reproduced at a short fine-tuning budget (200 steps)"),
        (results(74, 46, place=20), "not reproduced", "not reproduced at a short"),
        (results(74, 46, seeds=1), "inconclusive", "can't tell from one seed at a short fine-tuning budget"),
    ],
)
def test_the_verdict_and_its_remark_name_the_budget(made, word, remark):
    asked = PretrainingHelps()
    assert verdict(asked.bands(made)) == word
    assert any(r.startswith(remark) or remark in r for r in asked.remarks(made))


def test_long_arms_are_compared_with_their_own_control():
    made = results(74, 46)
    made[claim.MNIST_MP3] = {s: {TEST: 95.0 + s} for s in range(3)}
    made[claim.MNIST_SCRATCH] = {s: {TEST: 90.0 + s} for s in range(3)}
    said = [r for r in PretrainingHelps().remarks(made) if r.startswith("MNIST")]
    assert "an advantage: +5.0" in said[0]
    assert "control not tuned" in said[1]


def test_arms_share_their_pretraining_and_controls_have_none(tmp_path, monkeypatch):
    made = []

    def pretrain(masking, steps, seed, mnist, folder, start):
        made.append((masking, steps, seed, start))
        return folder / "no.ckpt", {PLACE: 37.0}

    monkeypatch.setattr(claim, "_pretrain", pretrain)
    monkeypatch.setattr(claim, "_finetune", lambda *_: {TEST: 50.0})
    monkeypatch.setattr(claim, "Pretrained", lambda path, freeze: None)
    asked = PretrainingHelps()
    found = {arm: asked.run(arm, settings, 0, False, tmp_path) for arm, settings in asked.arms.items()}
    assert made == [(0.5, 700, 0, "normal"), (0.0, 700, 0, "normal"), (0.5, 700, 0, "xavier")]
    assert found[SCRATCH] == {TEST: 50.0}
    assert found[LATE_MP3] == {TEST: 50.0, PLACE: 37.0}
    asked.run(MP3, asked.arms[MP3], 1, True, tmp_path)
    assert made[-1] == (0.5, 350, 1, "normal")  # --quick halves the pretraining


def test_one_arm_runs_in_silence_from_pretraining_to_the_test(tmp_path, capsys):
    settings = {"masking": 0.5, "positions": True, "steps": 4, "pretraining": 4, "labels": 128}
    found = PretrainingHelps().run("tiny", settings, 0, False, tmp_path)
    assert set(found) == {TEST, PLACE, "nonconstant %", "grid distance"}
    assert 0 <= found[TEST] <= 100
    assert capsys.readouterr().out == ""
