"""The claim's bands judge and its remarks stay honest; arms run on a small model."""

import pytest

from quire.reproduce import verdict
from quire_aded.claim import ADAPTIVE, CODE, GREEDY, GUARDED, RANDOM, STATIC, AdedClaim


def results(**code):
    forwards = {ADAPTIVE: 0.6, STATIC: 0.65, RANDOM: 1.0, **code}
    rest = {"same ids": 1.0, "tokens/CPU-s": 50.0, "first prompts": 0.5, "later prompts": 0.6}
    return {arm: {s: {CODE: forwards.get(arm, 1.0), **rest} for s in range(2)} for arm in AdedClaim.arms}


def test_bands_hold_for_the_expected_and_fail_for_each_departure():
    claim = AdedClaim()
    assert verdict(claim.bands(results())) == "reproduced"
    for broken in ({ADAPTIVE: 0.9}, {STATIC: 0.5}, {RANDOM: 0.7}):
        assert verdict(claim.bands(results(**broken))) == "not reproduced"
    other = results()
    other[GUARDED][1]["same ids"] = 0.0
    assert verdict(claim.bands(other)) == "not reproduced"


def test_no_gain_in_time_is_said():
    said = AdedClaim().remarks(results())
    assert sum("speed-up not reproduced on this CPU" in s for s in said) == 2
    assert any("not run here" in s for s in said)


@pytest.mark.slow
@pytest.mark.parametrize("arm", [GREEDY, ADAPTIVE, RANDOM])
def test_quick_arms_keep_greedys_ids(arm, tmp_path):
    found = AdedClaim().run(arm, AdedClaim.arms[arm], 0, True, tmp_path)
    assert found["same ids"] == 1 and 0 < found[CODE] <= 1
