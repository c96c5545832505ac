"""The claim's arithmetic on made-up results, and its quick run."""

from __future__ import annotations

import pytest
import torch

from quire.__main__ import execute
from quire.reproduce import verdict
from quire_multimae.claim import (
    BOTH,
    EDGES,
    GREY,
    MAE_EDGES,
    MAE_GREY,
    PATCH,
    RATIO,
    SCRATCH_EDGES,
    SCRATCH_GREY,
    TEST,
    WHOLE,
    CrossModalTransfer,
    grey_from_edges,
)


def results(grey=85.0, edges=80.0, mae=84.0, mae_edges=70.0, ratio=0.4, seeds=3):
    told = {RATIO: ratio, PATCH: 0.5, WHOLE: 0.11}
    values = {
        GREY: (grey, told),
        EDGES: (edges, told),
        BOTH: (grey, told),
        MAE_GREY: (mae, {}),
        MAE_EDGES: (mae_edges, {}),
    }
    values |= {SCRATCH_GREY: (80.0, {}), SCRATCH_EDGES: (70.0, {})}
    return {arm: {s: {TEST: v + s, **more} for s in range(seeds)} for arm, (v, more) in values.items()}


@pytest.mark.parametrize(
    ("made", "word"),
    [
        (results(), "reproduced"),
        (results(edges=73.0), "not reproduced"),
        (results(grey=90.0), "not reproduced"),
        (results(ratio=0.6), "not reproduced"),
        (results(seeds=1), "inconclusive"),
    ],
)
def test_the_verdict_needs_transfer_parity_and_a_lead(made, word):
    claim = CrossModalTransfer()
    assert verdict(claim.bands(made)) == word
    said = claim.remarks(made)
    assert ("not reproduced: edges-only +3.0 ± 0 points, needed +5" in said) == (made[EDGES][0][TEST] == 73.0)


def test_the_ridge_rows_are_those_of_the_spec_oracle_0_50_and_0_11():
    from quire.model import Model
    from quire_multimae.adapters import tiny_run
    from quire_multimae.digits import DigitModalities

    data = DigitModalities()
    model = Model(**tiny_run()["model"], spec=data.spec)
    model.configure_model()
    found = grey_from_edges(model, data)
    assert abs(found[PATCH] - 0.50) < 0.08 and abs(found[WHOLE] - 0.11) < 0.05
    assert found[RATIO] > 0.5  # untrained


def test_quick_runs_every_arm_and_prints_the_bands(tmp_path, capsys):
    torch.manual_seed(0)
    assert execute(["reproduce", "multimae", "--quick", "--folder", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "needed" in said or "below 0.5" in said
    assert all(arm in said for arm in (GREY, MAE_EDGES, SCRATCH_GREY))
    assert (tmp_path / "multimae" / "result.json").is_file()
