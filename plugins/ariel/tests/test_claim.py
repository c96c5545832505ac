"""The claim: bands judge, remarks say whose fault it is, and a quick arm measures."""

import pytest

from quire.reproduce import verdict
from quire_ariel.claim import AE, BOTH, CONTROL, EXACT, UNIQUE, VALID, ArielClaim, cube_of


def results(**changed):
    found = {}
    for arm in ArielClaim.arms:
        worth = {VALID: 0.98, UNIQUE: 0.97, BOTH: 0.95, EXACT: 1.0, f"{VALID}, low": 0.97, f"{VALID}, high": 0.99}
        if arm == AE:
            worth |= {VALID: 0.7, BOTH: 0.65, EXACT: 0.4}
        if arm.startswith("VAE"):
            worth |= {BOTH: 0.3, f"{BOTH}, N(0,1)": 0.2, "KL": 0.5}
        found[arm] = {s: dict(worth) for s in range(2)}
    for (arm, name), value in changed.get("to", {}).items():
        for row in found[arm].values():
            row[name] = value
    return found


def test_bands_hold_for_the_expected_and_fail_for_each_departure():
    claim = ArielClaim()
    assert verdict(claim.bands(results())) == "reproduced"
    for arm, name, value in (
        (cube_of(1), VALID, 0.94),
        (cube_of(4), BOTH, 0.89),
        (cube_of(16), EXACT, 0.9975),
        (CONTROL, UNIQUE, 0.94),
        (AE, BOTH, 0.9),
    ):
        assert verdict(claim.bands(results(to={(arm, name): value}))) == "not reproduced", (arm, name)


def test_a_failing_band_says_whether_the_language_model_fails_with_it():
    claim = ArielClaim()
    every = {(cube_of(d), VALID): 0.9 for d in (1, 4, 16)}
    said = " ".join(claim.remarks(results(to={**every, (CONTROL, VALID): 0.9})))
    assert "valid is below 0.95, and so is the control: the language model is short of training" in said
    said = " ".join(claim.remarks(results(to=every)))
    assert "the control is not (0.980): the code is at fault" in said


def test_what_must_always_be_said_is_said():
    said = " ".join(ArielClaim().remarks(results()))
    assert "variety of AriEL's points is the language model's" in said
    assert "VAE .02: valid unique from N(0,1) 0.200; KL 0.5 nats a sentence: collapsed" in said
    assert "the order of autoencoder and VAE is no claim" in said


@pytest.mark.slow
def test_quick_arms_measure(tmp_path):
    claim = ArielClaim()
    found = {
        arm: claim.run(arm, claim.arms[arm], 0, True, tmp_path) for arm in (cube_of(4), cube_of(1), CONTROL, "VAE .1")
    }
    assert found[cube_of(4)][EXACT] == found[cube_of(1)][EXACT] == 1
    assert found[cube_of(4)]["volume"] == pytest.approx(found[cube_of(1)]["volume"], rel=1e-5)
    assert 0 <= found["VAE .1"][f"{BOTH}, N(0,1)"] <= 1 and "KL" in found["VAE .1"]
    assert (tmp_path / "cube.png").is_file()
