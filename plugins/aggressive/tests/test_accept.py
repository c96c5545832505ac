"""Tolerance: what stands, what is lossless, and that it works with any drafter."""

import math

import pytest
import torch
from aggressive_toys import batch, greedy, rows, toy

from quire.errors import ConfigError
from quire.roles.language.contract import Draft
from quire.roles.language.drafters import PromptCopy
from quire.roles.language.loop import Speculative
from quire.roles.language.proof import assert_lossless
from quire_aggressive.accept import Tolerance

GENERATOR = torch.Generator()


def stands(beta, tau, logits=(5.0, 3.0, 1.0), token=1):
    table = torch.tensor([logits, logits])
    nodes, bonus = Tolerance(beta, tau).choose(table, Draft([token], [-1]), GENERATOR)
    assert bonus == 0
    return bool(nodes)


@pytest.mark.parametrize("beta", [1, 2, 3])
@pytest.mark.parametrize("tau", [0.0, 1.9, 2.0, 3.0])
def test_oracle_5_the_second_choice_two_below_stands_from_beta_2_and_tau_2_on(beta, tau):
    assert stands(beta, tau) == (beta >= 2 and tau >= 2)


def test_oracle_5_everything_stands_at_beta_v_and_infinite_tau():
    torch.manual_seed(0)
    logits, tokens = torch.randn(13, 20), torch.randint(0, 20, (12,)).tolist()
    nodes, bonus = Tolerance(20, math.inf).choose(logits, Draft.chain(tokens), GENERATOR)
    assert nodes == list(range(12)) and bonus == int(logits[12].argmax())
    assert Tolerance(999, math.inf).choose(logits, Draft.chain(tokens), GENERATOR)[0] == nodes


def test_oracle_5_beta_1_ignores_tau_and_acceptance_grows_with_both():
    torch.manual_seed(1)
    logits = torch.randn(400, 2, 12)
    tokens = torch.randint(0, 12, (400,)).tolist()

    def kept(beta, tau):
        rule = Tolerance(beta, tau)
        return {i for i, t in enumerate(tokens) if rule.choose(logits[i], Draft([t], [-1]), GENERATOR)[0]}

    assert kept(1, 0) == kept(1, math.inf) == kept(12, 0)
    for low, high in zip([kept(b, 1.5) for b in (1, 2, 4, 8)], [kept(b, 1.5) for b in (2, 4, 8, 12)]):
        assert low <= high
    for low, high in zip([kept(5, t) for t in (0, 0.5, 1, 2)], [kept(5, t) for t in (0.5, 1, 2, 9)]):
        assert low <= high
    assert len(kept(1, 0)) < len(kept(4, 1.5)) < len(kept(12, 9))


def test_in_a_tree_the_likeliest_child_that_may_stand_does():
    logits = torch.tensor([[5.0, 3.0, 4.0, 0.0]] * 4)
    tree = Draft([1, 2, 3], [-1, -1, 1])
    assert Tolerance(3, 2.0).choose(logits, tree, GENERATOR) == ([1], 0)
    assert Tolerance(3, 2.0).choose(logits, Draft([1, 0], [-1, -1]), GENERATOR) == ([1], 0)


def test_a_forbidden_token_never_stands():
    assert not stands(3, math.inf, (5.0, -math.inf, 1.0))


def test_a_tie_goes_to_the_argmax_where_it_says_lossless():
    assert not stands(2, 0.0, (5.0, 5.0, 1.0)) and stands(2, 0.1, (5.0, 5.0, 1.0))
    assert Tolerance(5, 0).lossless and Tolerance(1, 9).lossless and not Tolerance(2, 0.1).lossless


@pytest.mark.parametrize("arguments", [{"beta": 1, "tau": 3.0}, {"beta": 5, "tau": 0.0}])
def test_lossless_settings_give_greedys_ids(arguments):
    model, sources = toy("gpt2"), rows()
    given = batch("gpt2", sources)
    got = Speculative(PromptCopy(1), Tolerance(**arguments), max_new_tokens=30, debug=True)(model, given)
    assert got.tokens == greedy(model, given).tokens


def test_a_tolerant_run_accepts_more_and_may_differ():
    model, given = toy("gpt2"), batch("gpt2", rows())
    exact, loose = (
        Speculative(PromptCopy(1), rule, max_new_tokens=30, debug=True)(model, given)
        for rule in (Tolerance(), Tolerance(50, 1e9))
    )
    assert loose.stats.accepted > exact.stats.accepted
    assert loose.tokens != exact.tokens


def test_it_is_refused_as_a_proof_of_losslessness():
    with pytest.raises(ConfigError, match="Tolerance declares lossless=False"):
        assert_lossless(toy("gpt2"), Speculative(PromptCopy(), Tolerance(5, 3.0)), [[1, 2]])


@pytest.mark.parametrize(("arguments", "said"), [({"beta": 0}, "beta must be"), ({"tau": -1}, "tau must be")])
def test_bad_arguments_are_refused(arguments, said):
    with pytest.raises(ConfigError, match=said):
        Tolerance(**arguments)


def test_near_misses_on_trigram_trees():
    drafter = pytest.importorskip("quire_aded.drafter")
    model, given = toy("own causal"), batch("own causal", rows())
    results = []
    for rule in (Tolerance(), Tolerance(10, 6.0)):
        made = drafter.TrigramTree(corpus=None, nodes=16)
        made.learn([r + t[0] for r, t in zip(rows(), greedy(model, given).tokens)], 50)
        results.append(Speculative(made, rule, max_new_tokens=30, debug=True)(model, given))
    assert results[0].tokens == greedy(model, given).tokens
    assert results[1].stats.target_forwards <= results[0].stats.target_forwards
