"""The claim's arithmetic and words on made-up results, and that every arm runs; ``quire reproduce cae`` trains it."""

from __future__ import annotations

import json

import pytest

from quire.__main__ import execute
from quire.reproduce import verdict
from quire.roles.tokens.reconstruct import GridDecoder
from quire_cae import claim
from quire_cae.claim import (
    ATTENTIVE,
    CAE,
    LEFT,
    LINEAR,
    LINEAR_MEAN,
    MAE_PIXELS,
    MAE_TOKENS,
    MAJORITY,
    RANDOM,
    RAW,
    STD,
    TOKENS,
    UNALIGNED,
    RepresentationsBeatMae,
)


def results(cae, mae, std=0.5, noise=1.0, seeds=3):
    """Arms whose seeds scatter by ``noise``; CAE's the other way round, so differences have a standard error."""

    def arm(level, sign=1.0, **more):
        def one(seed):
            return level + sign * noise * (seed - (seeds - 1) / 2)

        return {s: {ATTENTIVE: one(s), LINEAR: one(s), LINEAR_MEAN: one(s), **more} for s in range(seeds)}

    told = {STD: std, LEFT: 0.4, TOKENS: 55.0, MAJORITY: 31.0}
    return {
        CAE: arm(cae, -1, **told),
        UNALIGNED: arm(cae - 1, **told),
        MAE_TOKENS: arm(mae, **{TOKENS: 54.0}),
        MAE_PIXELS: arm(mae - 1),
        RANDOM: arm(40.0),
        RAW: {s: {ATTENTIVE: 90.0, LINEAR: 96.0} for s in range(seeds)},
    }


@pytest.mark.parametrize(
    ("made", "word", "remark"),
    [
        (results(85, 80), "reproduced", "pretraining and the random encoder, attentive: +45.0"),
        (results(81, 80), "not reproduced", "not reproduced at this scale: difference +1.0 ± 1.2"),
        (results(78, 80), "not reproduced", "not reproduced at this scale: difference -2.0 ± 1.2"),
        (
            results(85, 80, std=0.05),
            "reproduced",
            "collapse monitor: least standard deviation of the latents aimed at 0.05, BELOW",
        ),
        (results(85, 80, seeds=1), "inconclusive", "one seed can't tell: difference +5.0 points"),
    ],
)
def test_the_verdict_and_what_is_said_beside_it(made, word, remark):
    asked = RepresentationsBeatMae()
    assert verdict(asked.bands(made)) == word
    assert any(r.startswith(remark) for r in asked.remarks(made))


def test_the_token_accuracy_stands_beside_the_majority_s_and_every_control_is_named():
    said = " | ".join(RepresentationsBeatMae().remarks(results(85, 80)))
    assert "by CAE 55.0 %, by MAE 54.0 %, by always saying the commonest 31.0 %" in said
    assert "with and without alignment" in said
    assert "MAE with pixels" in said


def test_mae_has_the_same_encoder_mask_tokens_and_depth():
    decoder, objective = claim._parts({"method": "mae", "tokens": True})
    own, ours = claim._parts({"method": "cae", "align": 2.0})
    assert isinstance(decoder, GridDecoder)
    assert decoder.depth == own.depth + ours.regressor.depth
    assert decoder.width == claim.WIDTH
    assert objective.masking.init_args == ours.masking.init_args
    assert objective.target.init_args == ours.target.init_args


def test_quick_runs_every_arm_through_the_console_script(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert execute(["reproduce", "cae", "--quick", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said["arms"]) == set(RepresentationsBeatMae.arms)
    assert said["verdict"] in ("inconclusive", "not reproduced")
    assert set(said["arms"][CAE]) >= {ATTENTIVE, LINEAR, LINEAR_MEAN, STD, LEFT, TOKENS, MAJORITY}
    assert STD in said["arms"][UNALIGNED]
    assert (tmp_path / "runs/reproduce/cae/result.png").is_file()
