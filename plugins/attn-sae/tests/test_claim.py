"""The claim's bands judge and its remarks stay honest; arms run on small models."""

import math

import pytest
import torch

from quire.reproduce import verdict
from quire_attn_sae.claim import HIT, JUDGED, MEAN, RANDOM, SHUFFLED, TRAINED, ZERO, AttentionClaim
from quire_attn_sae.repeats import Repeats, behind_earlier


def results(hit=0.95, shuffled=0.3, zero=0.95, mean=0.9, active=8.0):
    rest = {"L0": active, "FVU": 0.1, "dead": 0.0, "delta CE": 0.003, ZERO: zero, MEAN: mean, "zero gap": 0.1, HIT: hit}
    made = {arm: {s: dict(rest) for s in range(3)} for arm in AttentionClaim.arms}
    for seed in range(3):
        made[SHUFFLED][seed] = {HIT: shuffled}
    return made


def test_bands_hold_for_the_expected_and_fail_for_each_departure():
    claim = AttentionClaim()
    assert verdict(claim.bands(results())) == "reproduced"
    for broken in ({"hit": 0.7}, {"shuffled": 0.6}, {"zero": 0.7}, {"mean": 0.6}):
        assert verdict(claim.bands(results(**broken))) == "not reproduced"
    assert verdict(claim.bands(results(active=30.0))) == "inconclusive"
    assert verdict(claim.bands(results(zero=math.nan))) == "inconclusive"
    one = results()
    one[JUDGED][1][HIT] = 0.5  # every seed counts
    assert verdict(claim.bands(one)) == "not reproduced"


def test_what_failed_is_said_and_recovery_comes_with_its_price():
    said = AttentionClaim().remarks(results(hit=0.5, zero=0.7))
    assert any("best recovery at L0 < 20 is 0.700" in s for s in said)
    assert any("induction source hit 0.500" in s for s in said)
    for arm in (*TRAINED, RANDOM):
        assert any(s.startswith(f"{arm}: at L0") and "nats" in s and "FVU" in s for s in said)
    assert any("not run here" in s for s in said)


def test_a_source_is_behind_an_earlier_occurrence():
    found = behind_earlier(torch.tensor([[5, 6, 7, 5, 6, 5]]))[0]
    assert found[3].nonzero().flatten().tolist() == [1] and found[4].nonzero().flatten().tolist() == [2]
    assert found[5].nonzero().flatten().tolist() == [1, 4] and not found[:3].any()
    rows = Repeats(20).dataset("train").tensors["tokens"]
    assert bool(behind_earlier(rows)[:, 21:].any(2).all()) and not behind_earlier(rows)[:, :8].any()


@pytest.mark.parametrize("arm", [JUDGED, SHUFFLED])
def test_quick_arms_run(arm, tmp_path, monkeypatch):
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path))
    found = AttentionClaim().run(arm, AttentionClaim.arms[arm], 0, True, tmp_path)
    assert 0 <= found[HIT] <= 1 and 0 < found["head share"] <= 1
    if arm == JUDGED:
        assert found["L0"] <= 8 and {"FVU", "delta CE", ZERO, MEAN, "zero gap"} <= set(found)
