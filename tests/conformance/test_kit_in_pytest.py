"""The kit as a plugin's author meets it: one line, readable names, sentences; and objectives with several players."""

from __future__ import annotations

import pytest
from tests.conformance.healthy import vector_plugin
from tests.conformance.planted import broken, finds, planted

from quire import ConfigError
from quire.testing import conformance


def test_one_test_a_check_and_component(tmp_path, monkeypatch):
    with planted(tmp_path, monkeypatch, vector_plugin()) as name:
        made = conformance(name)
        number = name.partition("-")[2]
    (mark,) = [m for m in made.test_gradients.pytestmark if m.name == "parametrize"]
    assert sorted(mark.args[1]) == sorted(f"{c}{number}" for c in ("Line", "Back", "Rebuild", "Draws", "Bend"))
    assert made.test_learns.__doc__.startswith("The loss falls on one batch")
    assert not hasattr(made, "test_token_leak"), "no token encoder, no test of token encoders"


def test_a_fault_is_a_sentence_and_a_skip_has_a_reason(tmp_path, monkeypatch):
    files = broken(vector_plugin(), (" + self.spare", ""), ("        pass\n", '        {}["boom"]\n'))
    with planted(tmp_path, monkeypatch, files) as name:
        made, back = conformance(name), f"Back{name.partition('-')[2]}"
        with pytest.raises(KeyError):  # its own code: the author wants the traceback
            made().test_trains(back)
        with pytest.raises(pytest.skip.Exception, match="see trains"):
            made().test_reloads(back)
    with planted(tmp_path, monkeypatch, broken(vector_plugin(), (" + self.spare", ""))) as name:
        made, back = conformance(name), f"Back{name.partition('-')[2]}"
        with pytest.raises(pytest.fail.Exception, match=r"no gradient reaches decoder\.spare in 8 steps: use it"):
            made().test_gradients(back)


def test_a_plugin_that_is_not_installed_is_named():
    with pytest.raises(ConfigError, match="no plugin named coore is installed; did you mean core"):
        conformance("coore")


DUEL = '''

class DuelNN(Objective):
    """A maker against a critic. Doe et al. 2024.

    Returns:
        ``rebuild``, ``fool``: the maker's terms. ``judge``: the critic's.
    """

    decoder: PixelDecoder
    fields = ("vector",)
    players = ("maker", "critic")

    @classmethod
    def tiny(cls):
        whole = run()
        return {**whole, "model": {**whole["model"], "objective": "DuelNN"}}

    def build(self, spec):
        self.critic = nn.Linear(spec.need("features", self), 1, bias=False)  # it cancels

    def parameters_of(self, model, player):
        both = [*model.encoder.parameters(), *model.decoder.parameters()]
        return both if player == "maker" else self.critic.parameters()

    def forward(self, model, batch, player):
        made = model.decoder(model.encoder(batch))
        if player == "maker":
            return Losses({"rebuild": (made - batch["vector"]).square().mean(), "fool": -self.critic(made).mean()})
        return Losses({"judge": (self.critic(made.detach()) - self.critic(batch["vector"])).mean()})
'''


@pytest.mark.parametrize(
    ("edits", "checks", "words"),
    [
        ([], "", ""),
        ([("-self.critic(made).mean()", "-self.critic(made).mean(1)")], "trains", "RuntimeError"),
        ([("else self.critic.parameters()", "else []")], "trains", "nothing to train"),
        (
            [
                (
                    "self.critic(made.detach()) - self.critic(batch",
                    "self.critic(made.detach()) - self.critic(made.detach() + 0 * batch",
                )
            ],
            "gradients",
            "objective.critic",
        ),
    ],
    ids=["healthy", "a term that is no scalar", "a player without parameters", "a critic that learns nothing"],
)
def test_an_objective_with_players(tmp_path, monkeypatch, edits, checks, words):
    files = vector_plugin()
    files["parts.py"] += DUEL
    dots = 'register("quire_planted_NN.parts.DotsNN", "data"'
    duel = f'register("quire_planted_NN.parts.DuelNN", "objective")\n    {dots}'
    finds(tmp_path, monkeypatch, broken(files, (dots, duel, "__init__.py"), *edits), checks, words, "component")
