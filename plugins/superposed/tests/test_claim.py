"""The claim's bands judge and its remarks stay honest; arms run on a small model."""

import pytest

from quire.__main__ import execute
from quire.reproduce import verdict
from quire_superposed.claim import (
    ALONE,
    BARE,
    BATCH,
    BEST,
    COVERAGE,
    FORWARDS,
    GREEDY,
    OURS,
    PERPLEXITY,
    RATE,
    SHARE,
    TIME,
    TURNS,
    SuperposedClaim,
)


def results(**changed):
    usual = {FORWARDS: 10.0, TIME: 40.0, RATE: 700.0, PERPLEXITY: 30.0, BEST: 20.0, COVERAGE: 0.4, SHARE: 0.1}
    usual["cache rows"] = 1.0
    own = {
        TURNS: {FORWARDS: 30.0, TIME: 110.0, RATE: 250.0, PERPLEXITY: 60.0},
        BATCH: {RATE: 600.0, PERPLEXITY: 61.0, "cache rows": 3.0},
        BARE: {PERPLEXITY: 35.0},
    }
    made = {arm: {s: {**usual, **own.get(arm, {})} for s in range(2)} for arm in SuperposedClaim.arms}
    for (arm, name), value in changed.get("to", {}).items():
        made[arm][1][name] = value
    return made


def test_bands_hold_for_the_expected_and_fail_for_each_departure():
    claim = SuperposedClaim()
    assert verdict(claim.bands(results())) == "reproduced"
    for broken in ((OURS, FORWARDS, 12.0), (OURS, TIME, 150.0), (BATCH, PERPLEXITY, 29.0), (BARE, PERPLEXITY, 29.0)):
        made = results(to={broken[:2]: broken[2]})
        assert verdict(claim.bands(made)) == "not reproduced", broken


def test_the_papers_number_and_a_batch_as_fast_are_said():
    said = " ".join(SuperposedClaim().remarks(results()))
    assert "2.80 times" in said and "; reached here" in said and "as fast" not in said
    slow = results(to={(OURS, RATE): 100.0})
    said = " ".join(SuperposedClaim().remarks(slow))
    assert "not reached here" in said and "batched nucleus is as fast" in said
    assert "not tested here" in said


@pytest.mark.slow
def test_the_quick_claim_runs(tmp_path, capsys):
    assert execute(["reproduce", "superposed", "--quick", "--folder", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "verdict:" in said and "one batch of three" in said
    assert (tmp_path / "superposed" / "result.json").is_file()


@pytest.mark.slow
def test_quick_arms_count_passes_and_rows(tmp_path):
    claim = SuperposedClaim()
    found = {arm: claim.run(arm, claim.arms[arm], 0, True, tmp_path) for arm in (GREEDY, BATCH, TURNS, OURS, ALONE)}
    assert found[TURNS][FORWARDS] == 30 and found[BATCH][FORWARDS] == 10
    assert found[OURS][FORWARDS] <= 10 and found[OURS]["cache rows"] == 1
    assert found[ALONE][FORWARDS] == 0 and found[BATCH]["cache rows"] == 3
