"""The claim's bands judge, its remarks stay honest, and every kind of arm runs on small models."""

import pytest

from quire.reproduce import verdict
from quire_aggressive.claim import (
    CAUSAL,
    CAUSAL_COPY,
    COPY,
    EXACT,
    GAD,
    GOLD,
    HF,
    LOOKUP,
    LOOSE,
    PASSES,
    RATE,
    SHUFFLED,
    UNTRAINED,
    AggressiveClaim,
)


def results(changed=None, **ratios):
    expected = {COPY: 5.0, GAD: 3.0, SHUFFLED: 1.1, UNTRAINED: 1.0, **ratios}
    rest = {RATE: 50.0, "F0.5": 0.5, "exact": 0.4}
    found = {
        arm: {s: {PASSES: expected.get(arm, 1.0), "changed": 0.0, **rest} for s in range(3)}
        for arm in AggressiveClaim.arms
    }
    found[LOOSE][0]["changed"] = 0.1
    if changed is not None:
        found[changed][1]["changed"] = 0.05
    return found


def test_bands_hold_for_the_expected_and_fail_for_each_departure():
    claim = AggressiveClaim()
    assert verdict(claim.bands(results())) == "reproduced"
    for broken in ({COPY: 2.9}, {GAD: 1.9}, {SHUFFLED: 1.4}, {UNTRAINED: 1.4}):
        assert verdict(claim.bands(results(**broken))) == "not reproduced"
    for arm in EXACT:
        assert verdict(claim.bands(results(arm))) == "not reproduced"


def test_a_tolerant_arm_may_change_outputs_and_says_how_often():
    said = AggressiveClaim().remarks(results())
    assert LOOSE not in EXACT and any("GAD++ changes 3.3% of the outputs" in s for s in said)


def test_no_gain_in_time_is_said():
    said = AggressiveClaim().remarks(results())
    assert sum("no speed-up on this CPU" in s for s in said) == 6
    assert any("not run here" in s for s in said)


@pytest.mark.slow
@pytest.mark.parametrize("arm", [COPY, SHUFFLED, CAUSAL, HF, LOOKUP, CAUSAL_COPY, GAD, LOOSE, UNTRAINED, GOLD])
def test_quick_arms_run_and_keep_greedys_ids_where_they_say_so(arm, tmp_path):
    found = AggressiveClaim().run(arm, AggressiveClaim.arms[arm], 0, True, tmp_path)
    assert found["changed"] == 0 or arm == LOOSE
    assert found[PASSES] >= 1 and 0 <= found["F0.5"] <= 1
