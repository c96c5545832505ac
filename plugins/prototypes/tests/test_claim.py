"""The claim: its arms run and are cached, its bands judge, and what is uncovered is said even on success."""

import pytest

from quire.reproduce import verdict
from quire_prototypes import claim as module
from quire_prototypes.claim import KMEANS, LINEAR, WITH, WITHOUT, PrototypesClaim


def results(accuracy=0.97, r1=0.1, pixels=1.0, **extra):
    """Two seeds in which only the arm with R1 and R2 varies."""

    def arm(accuracy, r1, pixels, **extra):
        row = {"accuracy": accuracy, "R1": r1, "R2": 0.4, "pixel distance": pixels, "AE error": 1.8, **extra}
        return {0: row, 1: {**row, "accuracy": accuracy + 0.002}}

    found = {name: arm(0.97, 0.8, 2.0) for name in PrototypesClaim.arms}
    found[KMEANS] = arm(0.96, 0.02, 0.9)
    found[LINEAR] = {0: {"accuracy": 0.965}, 1: {"accuracy": 0.965}}
    return {**found, WITH: arm(accuracy, r1, pixels, **extra)}


def test_the_claim_holds_when_every_band_does():
    assert verdict(PrototypesClaim().bands(results())) == "reproduced"


@pytest.mark.parametrize(
    ("given", "which"),
    [({"accuracy": 0.94}, 0), ({"accuracy": 0.955}, 1), ({"r1": 0.3}, 2), ({"pixels": 1.5}, 3)],
)
def test_each_band_can_fail_the_claim_and_carries_its_values(given, which):
    bands = PrototypesClaim().bands(results(**given))
    assert bands[which].held is False and verdict(bands) == "not reproduced"
    assert WITH in bands[which].text and (which == 0 or WITHOUT in bands[which].text) and bands[which].needed


def test_uncovered_classes_are_printed_even_on_success():
    said = PrototypesClaim().remarks(results(**{"class 3 uncovered": 1.0, "class 8 uncovered": 1.0}))
    assert f"{WITH}: classes without a prototype: 3, 8 (seed 0); 3, 8 (seed 1)" in said


def test_the_controls_are_compared_and_a_better_one_is_named():
    said = " | ".join(PrototypesClaim().remarks(results()))
    assert "minus the control linear head: +0.0060" in said
    assert "k-means centres of the same codes are better on R1, pixel distance" in said
    assert "95 % bootstrap interval over seeds [+0.0000, +0.0000]" in said


@pytest.mark.parametrize("arm", [WITH, LINEAR, KMEANS])
def test_arms_measure_and_repeat(monkeypatch, tmp_path, arm):
    monkeypatch.setattr(module, "EPOCHS", 1)
    claim = PrototypesClaim()
    once, again = (claim.run(arm, claim.arms[arm], 0, True, tmp_path / str(i)) for i in range(2))
    assert once == again
    assert 0 <= once["accuracy"] <= 1
    if arm != LINEAR:
        names = {"R1", "R2", "pixel distance", "AE error", "classes owned", "prototypes used"}
        assert names <= set(once)
        assert once["classes owned"] + sum(k.startswith("class ") for k in once) == 10
        assert list((tmp_path / "0").glob("*.png")), "the arm leaves its pictures"


def test_arms_are_those_of_the_spec():
    switched = [(a["r1"], a["r2"]) for a in PrototypesClaim.arms.values() if "head" not in a]
    assert switched == [(1, 1), (0, 0), (1, 0), (0, 1), (5, 5)]
    assert (PrototypesClaim.seeds, PrototypesClaim.quick_seeds) == (5, 2)
