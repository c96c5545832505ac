"""The claim: its arms run and repeat, each band can fail it, and what must be said is said on success too."""

import pytest

from quire.reproduce import verdict
from quire_dkvb import claim as module
from quire_dkvb.claim import FEW, HALF, LINEAR, MEANS, NEIGHBOURS, NOISE, ONE, OURS, OURS_IID, BottleneckClaim


def results(**changed):
    """Two seeds; arms by their constant's name may be changed."""
    final = dict.fromkeys(BottleneckClaim.arms, 0.95) | {LINEAR: 0.2, ONE: 0.6, FEW: 0.85, NOISE: 0.86}
    final |= {getattr(module, name): value for name, value in changed.items()}
    curve = {f"after {i}": 0.2 * i for i in range(1, 5)}
    return {arm: {s: {"final": v, **curve, "keys used": 0.5} for s in (0, 1)} for arm, v in final.items()}


def test_the_claim_holds_when_every_band_does():
    assert verdict(BottleneckClaim().bands(results())) == "reproduced"


@pytest.mark.parametrize(
    ("changed", "which"),
    [
        ({"OURS": 0.92, "OURS_IID": 0.92}, 0),
        ({"LINEAR": 0.3}, 1),
        ({"OURS_IID": 0.98}, 2),
        ({"ONE": 0.96}, 3),
        ({"FEW": 0.96}, 4),
        ({"NOISE": 0.92}, 5),
    ],
)
def test_each_band_can_fail_the_claim(changed, which):
    bands = BottleneckClaim().bands(results(**changed))
    assert bands[which].held is False and verdict(bands) == "not reproduced"
    assert any("share of keys used" in said for said in BottleneckClaim().remarks(results(**changed)))


def test_baselines_that_do_not_forget_and_the_caveat_are_printed_on_success():
    said = " | ".join(BottleneckClaim().remarks(results(NEIGHBOURS=0.98)))
    assert f"{NEIGHBOURS} on the same features doesn't forget either: bottleneck minus {NEIGHBOURS} -0.0300" in said
    assert MEANS in said
    assert "the keys saw the unlabelled images of all classes; the paper's keys come from another data set" in said
    assert "share of keys used" not in said


def test_arms_are_those_of_the_spec():
    assert set(BottleneckClaim.arms) == {
        OURS, OURS_IID, LINEAR, module.LINEAR_IID, module.MLP, module.MLP_IID, MEANS, NEIGHBOURS, ONE, FEW, NOISE, HALF
    }  # fmt: skip
    assert (BottleneckClaim.seeds, BottleneckClaim.quick_seeds) == (3, 1)
    assert (module.SPLITS, module.EPOCHS) == (5, 20)


@pytest.mark.parametrize("arm", [OURS, NOISE, HALF, LINEAR, NEIGHBOURS])
def test_arms_measure_and_repeat(monkeypatch, tmp_path, arm):
    monkeypatch.setattr(module, "EPOCHS", 1)
    claim = BottleneckClaim()
    once, again = (claim.run(arm, claim.arms[arm], 0, True, tmp_path / str(i)) for i in range(2))
    assert once == again
    assert {"final", "after 1", "after 4", "forgetting", "first minus last"} <= set(once)
    assert ("keys used" in once) == (arm in (OURS, NOISE, HALF))
    assert (tmp_path / "0" / "stream.png").is_file()
    if arm == NOISE:
        assert once["keys used"] < 0.8, "keys of noise lie elsewhere"
