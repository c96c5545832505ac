"""Sampling: the core's rule is exact, the official code's is biased by a known amount."""

import pytest
import torch
from aded_toys import Memoryless

from quire.errors import ConfigError
from quire.roles.language.accept import SampleOnce
from quire.roles.language.contract import Draft
from quire_aded.accept import SampleTwice, leaves

LAW = (0.3, 0.5, 0.2)
CHAIN, SHARED = Draft([0], [-1]), Draft([0, 1, 2], [-1, 0, 0])


def frequencies(rule, draft, draws=20000):
    logits = Memoryless(LAW).logits.repeat(len(draft.tokens) + 1, 1)
    generator = torch.Generator().manual_seed(0)
    counts = [0, 0, 0]
    for _ in range(draws):
        nodes, bonus = rule.choose(logits, draft, generator)
        counts[draft.tokens[nodes[0]] if nodes else bonus] += 1
    return counts


@pytest.mark.parametrize("draft", [CHAIN, SHARED], ids=["chain", "shared prefix"])
def test_oracle_7_sampling_once_follows_the_law(draft):
    from scipy.stats import chisquare

    assert chisquare(frequencies(SampleOnce(), draft), [20000 * p for p in LAW]).pvalue > 0.001


def test_oracle_7_sampling_twice_gives_a_drafted_token_51_percent():
    assert frequencies(SampleTwice(), CHAIN)[0] / 20000 == pytest.approx(0.51, abs=0.015)


def test_two_paths_that_share_a_token_favour_it_even_more():
    assert frequencies(SampleTwice(), SHARED)[0] / 20000 == pytest.approx(0.657, abs=0.015)  # 1 - .7² · .7


def test_it_says_so():
    assert not SampleTwice.lossless and SampleOnce.lossless


def test_leaves_are_whole_paths():
    assert leaves(Draft([5, 6, 7, 8], [-1, 0, 0, -1])) == [[0, 1], [0, 2], [3]]


@pytest.mark.parametrize("top_p", [0, -1, 1.5])
def test_top_p_outside_its_range_is_refused(top_p):
    with pytest.raises(ConfigError, match=r"top_p must be in \(0, 1\]"):
        SampleTwice(top_p=top_p)


def test_temperature_0_is_refused():
    with pytest.raises(ConfigError, match="use Exact"):
        SampleTwice(temperature=0)
