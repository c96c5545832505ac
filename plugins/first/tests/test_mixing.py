"""Routed models under every sampler and drafter that must mix with them, and what is counted."""

import warnings

import pytest
import torch
from first_toys import ALL, SOURCED, codes, installed, prompts, routed, whole

from quire.roles.language.drafters import PromptCopy, SelfDraft
from quire.roles.language.loop import Greedy, Speculative
from quire.roles.language.proof import assert_lossless, batch_of
from quire_first.metrics import LayersUsed, mean_jaccard
from quire_first.routing import Routing

ROWS = prompts((5, 8, 3, 6))


class Encodes(torch.nn.Module):
    """An encoder whose codes are given."""

    def __init__(self, made):
        super().__init__()
        self.made = made

    def forward(self, batch):
        return self.made


def stands_for(name, model, rows=4):
    made = codes(name, rows)
    return whole(model, None if made is None else Encodes(made))


def given(name):
    if name not in SOURCED:
        return batch_of(ROWS, torch.nn.Linear(1, 1), {})
    return {"source": torch.zeros(4, 6, dtype=torch.long)}


@pytest.mark.parametrize("name", ALL)
def test_oracle_9_drafts_on_a_routed_model_give_routed_greedys_ids(name):
    model = stands_for(name, routed(name, protected=[], seed=3))
    want = Greedy(12)(model, given(name))
    for drafter in (PromptCopy(), SelfDraft({"layers": 2} if "universal" not in name else {"steps": 2}, tokens=3)):
        got = Speculative(drafter, max_new_tokens=12, debug=True)(model, given(name))
        assert got.tokens == want.tokens and got.finish == want.finish
    assert 0 < want.stats.layers_used_mean <= 4  # layers that a pass runs, for any of its rows


@pytest.mark.parametrize("name", ALL)
def test_oracle_9_a_routed_pass_drafts_for_the_full_model(name):
    routed_one = routed(name, protected=[], seed=3, force=[])
    model, plain = stands_for(name, routed_one), stands_for(name, routed_one.base)
    want = Greedy(12)(plain, given(name))
    got = Speculative(SelfDraft({"routed": True}, tokens=3), max_new_tokens=12, debug=True)(model, given(name))
    assert got.tokens == want.tokens and got.stats.drafter_forwards > 0


def test_oracle_9_a_routed_pass_that_skips_nothing_is_always_right():
    model = whole(routed(protected=[], force=[], loud=False))
    got = Speculative(SelfDraft({"routed": True}, tokens=3), max_new_tokens=13)(model, given("causal"))
    assert got.stats.accepted == got.stats.drafted - got.stats.cut or got.stats.cut


@pytest.mark.parametrize("batch", ["union", "group"])
def test_prompts_one_by_one_give_what_a_batch_gives(batch):
    model = whole(routed(protected=[], batch=batch, seed=3))
    together = Greedy(12)(model, given("causal")).tokens
    alone = [Greedy(12)(model, batch_of([r], model.decoder, {})).tokens[0] for r in ROWS]
    assert together == alone


@pytest.mark.parametrize("force", [None, []])
def test_trigram_trees(force):
    TrigramTree = installed("TrigramTree")
    model = whole(routed(protected=[], seed=3, force=force))
    greedy = Greedy(20)(model, given("causal")).tokens
    drafter = TrigramTree(corpus=None, nodes=12)
    drafter.learn([p + t[0] for p, t in zip(ROWS, greedy)], 60)
    assert_lossless(model, Speculative(drafter, max_new_tokens=20, debug=True), ROWS)


def test_source_copies():
    SourceCopy = installed("SourceCopy")
    model = whole(routed(protected=[], seed=3))
    spans = torch.tensor([[0, len(r)] for r in ROWS])
    assert_lossless(model, Speculative(SourceCopy(), max_new_tokens=20, debug=True), ROWS, source_span=spans)


def test_superposed_decoding():
    sampler = installed("Superposed")(ngrams=None, max_new_tokens=6)
    plain = routed(protected=[], force=[], loud=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = sampler(whole(plain), given("causal"))
        want = sampler(whole(plain.base), given("causal"))
        skips = sampler(whole(routed(protected=[], seed=3)), given("causal"))
    assert got.tokens == want.tokens and len(skips.tokens) == 4


# ---- what is counted
def test_layers_used_reads_patterns():
    on = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 0, 1]]).bool()
    found = {}
    for report in ("layers", "skip_rate", "entropy", "diversity"):
        metric = LayersUsed(report)
        metric.update(Routing(torch.full((3, 4), 0.5), on))
        found[report] = float(metric.compute())
    assert found["layers"] == 3 and found["skip_rate"] == 0.25
    assert found["entropy"] == pytest.approx(0.6931, abs=1e-3)
    assert found["diversity"] == pytest.approx(2 / 3)  # pairs: 0, 1, 0


def test_the_jaccard_index_of_equal_empty_and_single_sets_is_1():
    assert float(mean_jaccard(torch.tensor([[1, 0], [1, 0]]).bool())) == 1
    assert float(mean_jaccard(torch.zeros(3, 2, dtype=torch.bool))) == 1
    assert float(mean_jaccard(torch.zeros(1, 2, dtype=torch.bool))) == 1
    assert float(mean_jaccard(torch.tensor([[1, 1, 0], [0, 1, 1]]).bool())) == pytest.approx(1 / 3)


def test_several_of_these_metrics_read_the_same_run():
    model = whole(routed(protected=[], seed=3))
    model.metrics = [LayersUsed(), LayersUsed("diversity"), torch.nn.Identity()]
    got = Greedy(4)(model, given("causal"))
    for metric in model.metrics[:2]:
        metric.sampled(model, {}, got)
    assert int(model.metrics[0].rows) == int(model.metrics[1].rows) == 4 and not model.decoder.recent
    assert float(model.metrics[1].compute()) > 0
