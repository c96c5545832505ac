from __future__ import annotations

import pytest
import torch
from tests.language.toys import EOS, SHAPES, VOCAB, Gambler, batch, language_model, prompts, recomputed

from quire import ConfigError
from quire.contracts import Part
from quire.roles.language.accept import Exact, SampleOnce, nucleus, walk
from quire.roles.language.contract import Draft, Drafter
from quire.roles.language.drafters import DraftUnion, PromptCopy, Scripted, SelfDraft, SmallModel
from quire.roles.language.guard import SpeedGuard
from quire.roles.language.loop import Greedy, Sample, Speculative
from quire.roles.language.proof import assert_lossless, chi_square
from quire.roles.language.stats import Stats
from quire.roles.language.stop import StopRule


def ids(result):
    return [row[0] for row in result.tokens]


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_over_a_ragged_batch_equals_recomputation_of_each_row(shape):
    model, rows = language_model(shape), prompts()
    want = [recomputed(model, p, 20) for p in rows]
    for side in ("right", "left"):
        assert ids(Greedy(20)(model, batch(rows, side))) == want


@pytest.mark.parametrize("shape", SHAPES)
def test_trees_change_no_id_and_save_passes(shape):
    model, rows = language_model(shape), prompts()
    plain = Greedy(20)(model, batch(rows))
    for seed in range(3):
        result = Speculative(Gambler(rows, ids(plain), seed), max_new_tokens=20, debug=True)(model, batch(rows, "left"))
        assert ids(result) == ids(plain)
        assert result.finish == plain.finish
        assert result.stats.target_forwards < plain.stats.target_forwards
        stats = result.stats
        assert stats.accepted + stats.steps + stats.rows - stats.opened - stats.cut == stats.new_tokens


def drafters(model):
    small = language_model(seed=5, width=16, depth=1).decoder
    return {
        "copy": PromptCopy(),
        "latest": PromptCopy(2, 4, "latest"),
        "small": SmallModel(small, 3),
        "itself": SmallModel(model.decoder, 5),
        "shallow": SelfDraft({"layers": 1}, 3),
        "union": DraftUnion([PromptCopy(), SelfDraft({"layers": 2}, 2), SelfDraft({"layers": 1}, 4)]),
    }


@pytest.mark.parametrize("name", ["copy", "latest", "small", "itself", "shallow", "union"])
@pytest.mark.parametrize("guarded", [False, True])
def test_every_drafter_is_lossless(name, guarded):
    model = language_model()
    guard = SpeedGuard(cost={1: 1.0, 8: 2.0}, window=4, retry=6) if guarded else None
    sampler = Speculative(drafters(model)[name], guard=guard, max_new_tokens=24, debug=True)
    assert_lossless(model, sampler, prompts((1, 2, 9, 17, 40)))
    assert_lossless(model, sampler, prompts((5, 6)), batch=1)


def test_a_model_that_drafts_for_itself_is_never_wrong():
    model, rows = language_model(), prompts((4,))
    result = Speculative(SmallModel(model.decoder, 5), max_new_tokens=19)(model, batch(rows))
    assert result.stats.per_depth_accept() == dict.fromkeys(range(1, 6), 1.0)
    assert result.stats.target_forwards == 3  # 1 from the prompt, then 6 a pass


def test_n_tokens_cost_one_prefill_and_n_minus_one_steps():
    model = language_model(eos=None)
    assert Greedy(20)(model, batch(prompts((5,)))).stats.target_forwards == 19
    none = Greedy(0)(model, batch(prompts((5,))))
    assert (ids(none), none.stats.target_forwards) == ([[]], 0)


def test_an_end_inside_a_draft_ends_there_and_a_limit_cuts_exactly():
    model, rows = language_model(eos=None), prompts((5,))
    truth = ids(Greedy(30)(model, batch(rows)))[0]
    for limit in (1, 2, 7, 11):
        result = Speculative(Scripted(truth, 10), max_new_tokens=limit)(model, batch(rows))
        assert ids(result)[0] == truth[:limit]
        assert result.finish == [["length"]]
    stop = StopRule([9], 100)
    assert stop.feed([4, 9, 5, 6]) == [4, 9]
    assert stop.reason == "eos"


def test_a_stop_string_ends_as_soon_as_it_is_complete():
    stop = StopRule([], 100, ["ab"], lambda i: "".join(map(chr, i)))
    assert stop.feed([97]) == [97]
    assert stop.feed([98, 99]) == [98]
    assert stop.reason == "stop"


def test_the_stream_concatenates_to_the_result_and_may_stop_early():
    model, rows = language_model(), prompts()
    sampler = Speculative(SmallModel(model.decoder, 3), max_new_tokens=12)
    seen = {i: [] for i in range(len(rows))}
    for row, new in sampler.stream(model, batch(rows)):
        assert torch.is_grad_enabled()  # the consumer's mode is its own
        seen[row] += new
    assert list(seen.values()) == ids(sampler(model, batch(rows)))
    walk_ = sampler.stream(model, batch(rows))
    next(walk_)
    walk_.close()


def test_a_sampled_row_does_not_depend_on_its_batch():
    model, rows = language_model(), prompts()
    sampler = Sample(temperature=1.0, max_new_tokens=10, seed=4)
    together = ids(sampler(model, {**batch(rows), "index": torch.arange(5)}))
    alone = [ids(sampler(model, {**batch([p]), "index": torch.tensor([i])}))[0] for i, p in enumerate(rows)]
    assert together == alone
    assert together != ids(Sample(max_new_tokens=10, seed=5)(model, batch(rows)))


class Fixed(Part):
    """Logits whose law over five tokens is known."""

    law = torch.tensor([0.3, 0.5, 0.2])

    def forward(self, prefix, logits):
        return torch.cat([self.law.log(), torch.full((VOCAB - 3,), -torch.inf)])


class Always(Drafter):
    """Sibling drafts of token 0 and 1, each followed by 0."""

    def propose(self, row, context, budget):
        return Draft([0, 1, 0, 0], [-1, -1, 0, 1])


@pytest.mark.parametrize("drafter", [None, Always()])
def test_sampling_follows_the_law_with_and_without_drafts(drafter):
    model = language_model(width=16, depth=1, eos=None)
    rule = SampleOnce()
    law = [*Fixed.law.tolist(), *[0.0] * (VOCAB - 3)]
    generator = torch.Generator().manual_seed(0)
    draft = Draft([0, 1, 0, 0], [-1, -1, 0, 1]) if drafter is not None else Draft([], [])
    rows = torch.stack([Fixed()([], None)] * 5)
    counts = torch.zeros(VOCAB)
    for _ in range(4000):  # the first emitted token behind the pending one
        nodes, bonus = rule.choose(rows, draft, generator)
        counts[draft.tokens[nodes[0]] if nodes else bonus] += 1
    from scipy.stats import chisquare

    assert chisquare(counts[:3].numpy(), 4000 * Fixed.law.numpy()).pvalue > 0.001
    sampler = Speculative(drafter, rule, max_new_tokens=1, processors=[Fixed()])
    assert chi_square(model, sampler, [5], law, 1500) > 0.001


def test_nucleus_and_top_k_keep_the_smallest_sets():
    law = torch.tensor([0.1, 0.4, 0.3, 0.2])
    assert nucleus(law, 0.7, 0).tolist() == pytest.approx([0, 4 / 7, 3 / 7, 0])
    assert nucleus(law, 1.0, 1).tolist() == [0, 1, 0, 0]
    assert nucleus(law, 1e-9, 0).tolist() == [0, 1, 0, 0]


def test_walking_a_tree_follows_children_only():
    draft = Draft([7, 8, 9], [-1, 0, 0])
    answers = {0: 7, 1: 9, 3: 5}
    assert walk(draft, answers.__getitem__) == ([0, 2], 5)
    assert walk(draft, {0: 8}.__getitem__) == ([], 8)


def test_processors_see_each_nodes_own_prefix():
    model, rows, seen = language_model(eos=None), prompts((3,)), []

    class Spy(Part):
        def forward(self, prefix, logits):
            seen.append(tuple(prefix))
            return logits

    truth = ids(Greedy(6)(model, batch(rows)))[0]
    Speculative(Scripted(truth, 3), max_new_tokens=6, processors=[Spy()])(model, batch(rows))
    assert set(seen) == {tuple(rows[0] + truth[:n]) for n in range(6)}


def test_a_guard_goes_plain_on_a_drafter_that_is_always_wrong_and_never_on_one_that_is_right():
    model, rows = language_model(eos=None), prompts((3,))
    plain = Greedy(200)(model, batch(rows))
    for wrong in (True, False):
        guard = SpeedGuard(cost={1: 1.0, 8: 2.0})
        sampler = Speculative(Scripted(ids(plain)[0], 7, wrong), guard=guard, max_new_tokens=200)
        result = sampler(model, batch(rows))
        assert ids(result) == ids(plain)
        assert (result.stats.guard_off_steps > 0) is wrong
        if wrong:
            assert result.stats.target_forwards == plain.stats.target_forwards


def test_a_guards_price_is_linear_between_the_tables_entries():
    guard = SpeedGuard(cost={1: 1.0, 8: 2.0})
    assert [guard.price(n) for n in (0, 7)] == [1.0, 2.0]
    assert guard.price(3) == pytest.approx(1 + 3 / 7)
    assert guard.price(15) == pytest.approx(4.0)


def test_prompt_copy_proposes_what_followed_the_leftmost_longest_match():
    copy = PromptCopy(ngram=3, tokens=4)
    context = [1, 2, 3, 9, 9, 1, 2, 3, 7, 7, 1, 2, 3]
    copy.begin(None, [context], None)
    assert copy.propose(0, context, 10).tokens == [9, 9, 1, 2]
    latest = PromptCopy(ngram=3, tokens=4, match="latest")
    latest.begin(None, [context], None)
    assert latest.propose(0, context, 10).tokens == [7, 7, 1, 2]
    assert copy.propose(1, [4, 5, 6], 10) is None


def test_a_union_merges_equal_paths_once():
    union = DraftUnion([Scripted([5, 6, 7], 3), Scripted([5, 6, 8], 3)])
    union.begin(None, [[1]], None)
    draft = union.propose(0, [1], 10)
    assert (draft.tokens, draft.parents) == ([5, 6, 7, 8], [-1, 0, 1, 1])
    assert Draft([5, 6, 7], [-1, 0, 1]).cut(2, 9).tokens == [5, 6]


def test_a_divergence_is_reported_with_the_logit_gap():
    model = language_model(eos=None)

    class Liar(Exact):
        def choose(self, logits, draft, generator):
            nodes, bonus = super().choose(logits, draft, generator)
            return nodes, (bonus + 1) % VOCAB

    with pytest.raises(AssertionError, match=r"prompt 0 differs at new token 1: greedy \d+ \(logit .*gap"):
        assert_lossless(model, Speculative(acceptance=Liar(), max_new_tokens=4), prompts((3,)))
    with pytest.raises(ConfigError, match="use Exact, and chi_square"):
        assert_lossless(model, Sample(max_new_tokens=4), prompts((3,)))


def test_statistics_merge_and_count():
    stats = Stats()
    stats.count([1, 2, 3], 2)
    stats.count([1, 2], 0)
    both = stats.merge(stats)
    assert both.per_depth_accept() == {1: 0.5, 2: 0.5, 3: 0.0}
    assert both.accepted_hist == {0: 2, 2: 2}
    assert "accepted" in both.table()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Greedy(-1), "max_new_tokens must be at least 0"),
        (lambda: Speculative(budget=0), "budget must be at least 1"),
        (lambda: Sample(temperature=0), "temperature must be above 0, got 0: use Exact"),
        (lambda: Sample(top_p=0), r"top_p must be in \(0, 1\]"),
        (lambda: PromptCopy(match="last"), "match is first or latest"),
        (lambda: DraftUnion([]), "at least one drafter"),
        (lambda: SpeedGuard(cost={}), "cost needs slots"),
        (lambda: Scripted([1], 0), "tokens must be at least 1"),
    ],
)
def test_arguments_out_of_range_are_named(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_prompts_without_tokens_or_too_long_are_named():
    empty = {"tokens": torch.zeros(1, 2, dtype=torch.long), "mask": torch.zeros(1, 2, dtype=torch.bool)}
    with pytest.raises(ConfigError, match="prompt 0 is empty and the tokenizer has no start token"):
        Greedy(2)(language_model(bos=None), empty)
    assert len(ids(Greedy(2)(language_model(), empty))[0]) >= 1
    with pytest.raises(ConfigError, match="prompt 0 has 64 tokens; the model takes 64"):
        Greedy(2)(language_model("learned"), batch(prompts((64,))))
    limited = Greedy(30)(language_model("learned", eos=None), batch(prompts((60,))))
    assert [len(r) for r in ids(limited)] == [4]
    foreign = Speculative(SmallModel(language_model().decoder))
    with pytest.raises(ConfigError, match="the drafter has 50 tokens, the model 60"):
        foreign(language_model(vocab_size=60), batch(prompts((3,))))


def test_eos_ends_a_row_while_others_go_on():
    model = language_model()
    rows = prompts(tuple(range(1, 20)))
    result = Greedy(40)(model, batch(rows))
    ends = [f[0] for f in result.finish]
    assert {"eos", "length"} >= set(ends)
    assert all((row[-1] == EOS) == (end == "eos") for row, end in zip(ids(result), ends))
