"""The claim's bands judge, its remarks never praise what was not shown, and it runs."""

import json

import pytest

from quire.__main__ import execute
from quire.reproduce import verdict
from quire_gsae.claim import DEAD, GRAD, GRAD_CE, PLAIN_CE, STRONG, TOP, GsaeClaim
from quire_gsae.table import SENTENCE


def results(seeds=3, **changed):
    values = {
        TOP: {PLAIN_CE: 0.082, GRAD_CE: 0.054, DEAD: 0.12},
        GRAD: {PLAIN_CE: 0.086, GRAD_CE: 0.058, DEAD: 0.003},
        STRONG: {PLAIN_CE: 0.098, GRAD_CE: 0.1, DEAD: 0.0},
    }
    for arm, more in changed.items():
        values[{"top": TOP, "grad": GRAD}[arm]].update(more)
    rest = {"FVU plain": 0.1, "steering": 1.0}
    return {
        arm: {s: {**rest, **{k: v * (1 + 0.02 * (s - 1)) for k, v in own.items()}} for s in range(seeds)}
        for arm, own in values.items()
    }


def said(found):
    return "\n".join(GsaeClaim().remarks(found))


def test_the_expected_reproduces_with_label_using_selection_only():
    claim = GsaeClaim()
    assert verdict(claim.bands(results())) == "reproduced"
    text = said(results())
    assert "reproduced, with label-using selection" in text and SENTENCE in text
    assert "label-free (selected plain, both): no gain" in text


def test_each_departure_fails_and_is_named():
    alive = results(grad={DEAD: 0.1})
    assert verdict(GsaeClaim().bands(alive)) == "not reproduced"
    assert "dead-latent effect not reproduced at this scale" in said(alive)
    same = results(grad={GRAD_CE: 0.0815})
    assert verdict(GsaeClaim().bands(same)) == "not reproduced"
    assert "downstream-loss effect not reproduced: gap" in said(same)


def test_label_free_is_reproduced_only_beyond_twice_the_spread():
    assert "both): reproduced" in said(results(grad={PLAIN_CE: 0.05}))
    assert "both): no gain" in said(results(grad={PLAIN_CE: 0.081}))
    assert "both): no gain" in said(results(seeds=1, grad={PLAIN_CE: 0.01}))


def test_one_seed_can_not_tell():
    assert verdict(GsaeClaim().bands(results(seeds=1))) == "inconclusive"


def test_a_dictionary_without_dead_latents_shows_no_drop():
    assert GsaeClaim().bands(results(top={DEAD: 0.0}))[0].held is False


@pytest.mark.filterwarnings("ignore")
def test_quick_runs_through_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert execute(["reproduce", "gsae", "--quick"]) == 0
    report = json.loads((tmp_path / "runs/reproduce/gsae/result.json").read_text())
    assert set(report["arms"]) == {TOP, GRAD, STRONG} and SENTENCE in report["remarks"]
    assert report["arms"][TOP]["L0 plain"]["mean"] == pytest.approx(report["arms"][GRAD]["L0 plain"]["mean"], abs=0.5)
