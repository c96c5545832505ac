"""The claim's bands judge, its remarks stay honest, and every arm runs at a small size."""

import pytest
import torch

from quire.reproduce import main, verdict
from quire_first.claim import ACCURACY, BASE, LN, LU, RANDOM, RL, SKIP, TIME, UNIFIED, FirstClaim, R, task_jaccard


def results(jaccard=0.5, time=0.78, skip=0.25, **accuracy):
    found = {BASE: 0.98, R: 0.9, RL: 0.97, LU: 0.96, LN: 0.98, UNIFIED: 0.7, RANDOM: 0.6, **accuracy}
    rest = {SKIP: skip, TIME: time, "task Jaccard": jaccard}
    return {arm: {s: {ACCURACY: found.get(arm, 0.8), **rest} for s in range(2)} for arm in FirstClaim.arms}


def test_bands_hold_for_the_expected_and_fail_for_each_departure():
    claim = FirstClaim()
    assert verdict(claim.bands(results())) == "reproduced"
    for broken in (results(**{UNIFIED: 0.95}), results(**{RANDOM: 0.91}), results(**{RL: 0.9})):
        assert verdict(claim.bands(broken)) == "not reproduced"
    for broken in (results(time=0.9), results(skip=0.1)):
        assert verdict(claim.bands(broken)) == "not reproduced"
    one = results()
    one[R][1][ACCURACY] = 0.5  # in one seed only
    assert verdict(claim.bands(one)) == "not reproduced"


def test_it_says_that_it_is_a_reconstruction_and_whether_routing_is_adaptive():
    said = FirstClaim().remarks(results())
    assert any("reconstruction" in s for s in said) and any("not run here" in s for s in said)
    assert any(f"{RL} minus {LU}: +0.010" in s for s in said)
    assert not any("not input-adaptive here" in s for s in said)
    assert sum("routing is not input-adaptive here" in s for s in FirstClaim().remarks(results(jaccard=1.0))) == 2


def test_the_jaccard_index_across_tasks_leaves_pairs_of_one_task_out():
    skipped = torch.tensor([[1, 0], [1, 0], [1, 1]]).bool()
    assert task_jaccard(skipped, torch.tensor([0, 0, 1])) == pytest.approx(0.5)


def test_quick_reproduces_every_arm(tmp_path, capsys):
    assert main(["first", "--quick", "--folder", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for arm in FirstClaim.arms:
        assert arm in printed
    assert "verdict:" in printed and "reconstruction" in printed
