"""The claim's bands judge, its remarks say which side is ahead at each length, and it runs."""

import json

import pytest

from quire.__main__ import execute
from quire.reproduce import verdict
from quire_topafa.claim import EPS, L0, LAMBDAS, LENGTHS, MATCHED, NMSE, RATIO, TopAfaClaim, anchor, arm


def results(**changed):
    made = {}
    for steps in LENGTHS:
        for place, name in enumerate(LAMBDAS):
            ratio = 0.9 if steps == LENGTHS[0] else 1.7
            own = {L0: 78.0 + 6 * place, EPS: 1.4e-4 - 3e-5 * place, NMSE: 0.01 * ratio, MATCHED: 0.01, RATIO: ratio}
            made[arm(name, steps)] = {seed: dict(own) for seed in range(3)}
        made[anchor(steps)] = {seed: {L0: 8.0, EPS: 1e-3, NMSE: 0.1, MATCHED: 0.1, RATIO: 1.0} for seed in range(3)}
    for (name, steps), more in changed.get("at", {}).items():
        for own in made[arm(name, steps)].values():
            own.update(more)
    return made


def test_the_expected_reproduces_and_both_winners_are_named():
    claim = TopAfaClaim()
    assert set(results()) == set(claim.arms) and verdict(claim.bands(results())) == "reproduced"
    said = "\n".join(claim.remarks(results()))
    assert said.count("TopAFA is ahead") == 3 and said.count("TopK is ahead") == 3
    assert "the mean L0 exceeds D = 64" in said


@pytest.mark.parametrize(
    ("where", "changed"),
    [
        (("1/16", 250), {L0: 70.0}),
        (("1/128", 700), {L0: 60.0}),
        (("1/32", 700), {EPS: 2e-4}),
        (("1/32", 250), {RATIO: 2.5}),
    ],
)
def test_each_departure_fails(where, changed):
    found = results(at={where: changed})
    assert verdict(TopAfaClaim().bands(found)) == "not reproduced"
    said = "\n".join(TopAfaClaim().remarks(found))
    assert ("not reproduced: NMSE ratio 2.5 (band <= 2)" in said) == (RATIO in changed)
    assert ("does not always exceed D" in said) == (changed.get(L0) == 60.0)


@pytest.mark.filterwarnings("ignore")
def test_quick_runs_through_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert execute(["reproduce", "topafa", "--quick"]) == 0
    report = json.loads((tmp_path / "runs/reproduce/topafa/result.json").read_text())
    assert set(report["arms"]) == set(TopAfaClaim.arms)
    own = report["arms"][arm("1/32", 250)]
    assert own["k of TopK"]["mean"] == round(own[L0]["mean"])
