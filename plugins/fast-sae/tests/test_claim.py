"""The claim's bands judge and its remarks stay honest; its arms run on a subject that is hardly trained."""

from __future__ import annotations

import math

import pytest

from quire.__main__ import execute
from quire.reproduce import verdict
from quire_fast_sae import subject, trials
from quire_fast_sae.claim import ALL, BLOCKS, FAST, LATER, PRETRAIN, SPECIAL, FastClaim

EXPECTED = {PRETRAIN: (-3.1, -2.6, -2.6), BLOCKS: (-3.5, -3.9, -4.0), FAST: (-3.8, -5.0, -4.1)}


def results(seeds=2, **changed):
    made = {}
    for arm in FastClaim.arms:
        whole, special, later = changed.get(arm, EXPECTED[arm])
        rest = {"log2 <U>": -4.0, "log2 median_st": -5.0, "L0": 8.0, "FVU": 0.1, "delta CE": 0.1}
        made[arm] = {s: {ALL: whole, SPECIAL: special, LATER: later, **rest} for s in range(seeds)}
    return made


def test_bands_hold_for_the_expected_and_fail_for_each_departure():
    claim = FastClaim()
    assert verdict(claim.bands(results())) == "reproduced"
    departures = (
        {PRETRAIN: (-3.1, -4.2, 0)},  # special order
        {FAST: (-3.8, -4.1, 0)},  # ratio 1.15
        {FAST: (-3.8, -6.2, 0)},  # ratio 4.9
        {FAST: (-3.4, -5.0, 0)},  # worse over all tokens
        {PRETRAIN: (-3.6, -2.6, 0)},  # overall order
    )
    for change in departures:
        assert verdict(claim.bands(results(**change))) == "not reproduced", change
    one = results()
    one[FAST][1][SPECIAL] = -3.95
    assert [b.held for b in claim.bands(one)] == [True, False, True, True]


def test_the_remarks_say_where_the_gain_comes_from_and_what_the_papers_numbers_are():
    said = " ".join(FastClaim().remarks(results()))
    assert "most of the gain is position 0" in said and "23.5 and 1.82" in said and "delta CE: BT(P) 0.1" in said
    even = FastClaim().remarks(results(**{FAST: (-3.8, -5.0, -5.0)}))
    assert not any("position 0:" in s or "is position 0" in s for s in even)


@pytest.fixture
def untrained(tmp_path, monkeypatch):
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subject, "STEPS", {"tiny-chat": 2, "tiny-chat-20s": 2})
    subject.tiny_chat.cache_clear()
    trials.shared.cache_clear()
    yield
    subject.tiny_chat.cache_clear()
    trials.shared.cache_clear()


@pytest.mark.usefixtures("untrained")
def test_a_quick_reproduction_runs_and_prints_a_verdict(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert execute(["reproduce", "fast-sae", "--quick"]) == 0
    said = capsys.readouterr().out
    assert "verdict: " in said and "log2 MSE_st" in said and "delta CE" in said
    assert (tmp_path / "runs/reproduce/fast-sae/result.png").is_file()
    assert list((tmp_path / "runs/reproduce/fast-sae").glob("FAST-0-*/card.json"))


@pytest.mark.usefixtures("untrained")
def test_arms_see_as_many_tokens_and_one_scale(tmp_path):
    common = trials.shared(True)
    for settings in FastClaim.arms.values():
        data = trials.feed(settings["feed"], common.subject, 0, train_samples=64, transforms=[common.standard])
        batches = list(data.train_dataloader())
        assert batches and all(len(b["token"]) == trials.TOKENS for b in batches)
    model, _ = trials.trained("instances", 0, True)
    around = trials.Around(model.encoder, common.standard)
    batch = next(iter(common.held.val_dataloader()))
    scaled = (batch["activation"] - common.standard.mean) / common.standard.scale
    assert math.isclose(float(scaled.square().mean()), 1.0, rel_tol=0.2)
    codes = model.encoder({"activation": scaled})
    assert (around(batch).dense() == codes.dense()).all()
