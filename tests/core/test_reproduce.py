from __future__ import annotations

import json

import pytest

from quire import plugins
from quire.__main__ import execute
from quire.reproduce import Band, Claim, difference, verdict


class Coin(Claim):
    """A claim whose arms return what their settings say."""

    paper = "Coin, nobody 2020"
    statement = "heads beats tails"
    budget = "no data"
    arms = {"heads": {"value": 2.0}, "tails": {"value": 1.0}}
    extra = {"edge": {"edge": {"value": 9.0}}}
    seeds, quick_seeds, headline = 3, 1, "score"
    runs: list[tuple[str, int]] = []
    broken = False

    def run(self, arm, settings, seed, quick, folder):
        if Coin.broken and arm == "tails":
            raise RuntimeError("no tails")
        Coin.runs.append((arm, seed))
        return {"score": settings["value"] + 0.01 * seed}

    def bands(self, results):
        gap, _ = difference(results, "heads", "tails", "score")
        return [Band("heads minus tails", gap, ">= 0.5", gap >= 0.5)]


@pytest.fixture
def coin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Coin.runs, Coin.broken = [], False
    monkeypatch.setitem(plugins.load().claims, "coin", (f"{__name__}.Coin", "coin"))
    monkeypatch.setattr("quire.reproduce.load_object", lambda path: Coin)
    return tmp_path


def test_it_prints_claim_arms_spread_and_verdict_and_writes_them(coin, capsys):
    assert execute(["reproduce", "coin"]) == 0
    out = capsys.readouterr().out
    assert "heads beats tails" in out
    assert "3 seeds" in out
    assert "verdict: reproduced (for this budget)" in out
    report = json.loads((coin / "runs/reproduce/coin/result.json").read_text())
    assert report["arms"]["heads"]["score"] == {"mean": pytest.approx(2.01), "sd": pytest.approx(0.01)}
    assert (coin / "runs/reproduce/coin/result.png").stat().st_size > 1000


def test_it_resumes_and_caches_by_settings(coin):
    execute(["reproduce", "coin", "--seeds", "1"])
    execute(["reproduce", "coin", "--seeds", "2"])
    assert Coin.runs == [("heads", 0), ("tails", 0), ("heads", 1), ("tails", 1)]
    execute(["reproduce", "coin", "--seeds", "1", "--fresh"])
    assert len(Coin.runs) == 6
    execute(["reproduce", "coin", "--seeds", "1", "--arms", "edge"])
    assert Coin.runs[-1] == ("edge", 0)


def test_a_failing_arm_gives_exit_code_1_and_its_name(coin, capsys):
    Coin.broken = True
    assert execute(["reproduce", "coin"]) == 1
    assert "tails, seed 0: RuntimeError: no tails" in capsys.readouterr().out


def test_not_reproduced_is_an_honest_zero_unless_strict(coin, monkeypatch, capsys):
    monkeypatch.setattr(Coin, "arms", {"heads": {"value": 1.0}, "tails": {"value": 1.0}})
    assert execute(["reproduce", "coin"]) == 0
    assert "FAILS: heads minus tails: 0, needed >= 0.5" in capsys.readouterr().out
    assert execute(["reproduce", "coin", "--strict"]) == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["coyn"], "did you mean coin"),
        (["coin", "--arms", "rim"], "no optional arm set 'rim'; it has edge"),
        (["coin", "--seeds", "0"], "at least 1"),
    ],
)
def test_wrong_arguments_are_named(coin, capsys, argv, said):
    assert execute(["reproduce", *argv]) == 2
    assert said in capsys.readouterr().err


def test_a_band_that_can_not_be_told_is_inconclusive():
    good, bad, unknown = (Band("x", 0, "", held) for held in (True, False, None))
    assert verdict([good]) == "reproduced"
    assert verdict([good, unknown]) == "inconclusive"
    assert verdict([good, unknown, bad]) == "not reproduced"
    assert verdict([]) == "inconclusive"
