"""The claim: equal parameters are equal, bands judge, and every control stands at equal offsets."""

import pytest

from quire_universal.claim import EQUAL, OUT, OWN, UT, WEIGHTS, UniversalClaim, _parts


def results(ut=0.7, own=0.5, equal=0.4, steps=(3.0, 2.9, 2.5, 1.2)):
    found = {}
    for name, value in ((UT, ut), (OWN, own), (EQUAL, equal)):
        for arm in (f"reverse {name}", f"reverse {name}, no offset"):
            found[arm] = {s: {OUT: value + 0.01 * s} for s in range(3)}
    for w, n in zip(WEIGHTS, steps):
        found[f"sort ACT, ponder {w:g}"] = {s: {OUT: 0.5, "steps": n} for s in range(3)}
    return found


def test_bands_hold_and_fail_as_the_numbers_say():
    claim = UniversalClaim()
    assert all(b.held for b in claim.bands(results()))
    held = {b.text: b.held for b in claim.bands(results(ut=0.52))}
    assert list(held.values()) == [False, True, True, True, True]
    assert not claim.bands(results(steps=(2.0, 2.5, 2.4, 1.0)))[-1].held
    assert any("offset alone" in r for r in claim.remarks(results()))


def test_every_arm_has_its_control_without_offset():
    for name in (UT, OWN, EQUAL):
        with_, without = (dict(UniversalClaim.arms[f"reverse {name}{end}"]) for end in ("", ", no offset"))
        assert with_.pop("offset") and not without.pop("offset") and with_ == without


@pytest.mark.parametrize("task", ["reverse", "facts"])
def test_parameters_of_the_control_are_about_equal(task):
    counts = {}
    for name in (UT, OWN, EQUAL):
        model, inside, _ = _parts({**UniversalClaim.arms[f"reverse {name}"], "task": task}, 0, True)
        model.spec = inside.spec
        model.configure_model()
        counts[name] = sum(p.numel() for p in model.parameters())
    assert abs(counts[EQUAL] / counts[UT] - 1) < 0.1 and counts[OWN] > 3 * counts[UT]
