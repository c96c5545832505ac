"""SourceCopy: the paper's rule on its fixtures, the same ids as greedy on every kind of model, few passes."""

import functools
import random
from types import SimpleNamespace

import pytest
import torch
from aggressive_toys import BOS, CAUSAL, EOS, SEQ2SEQ, SPEC, VOCAB, batch, greedy, rows, said, toy

from quire.errors import ConfigError, DataError
from quire.matching import check_fields
from quire.model import Model
from quire.roles.language.accept import SampleOnce
from quire.roles.language.contract import Draft
from quire.roles.language.drafters import DraftUnion, PromptCopy
from quire.roles.language.loop import Speculative
from quire.roles.language.models import CausalLM
from quire.roles.language.proof import assert_lossless, chi_square
from quire_aggressive.source import Alignment, SourceCopy, merged

X = [5, 6, 7, 8, 5, 6, 9]
ALL = (*SEQ2SEQ, *CAUSAL)
PAPER = {"resume": False, "adapt": False}
SETTINGS = [PAPER, {}, {"multiple": "nearest"}, {"multiple": "tree"}, {"max_draft": 3, "max_gram": 1}]


class Given(SourceCopy):
    """Copies from given sources, whatever the batch's are: a random network's outputs resemble no input."""

    def __init__(self, given, **arguments):
        super().__init__(**arguments)
        self.given = given

    def begin(self, model, prompts, sources):
        super().begin(model, prompts, self.given)


def slips(ids, seed=0, share=0.2):
    """Ids with some replaced, dropped or doubled."""
    draw, out = random.Random(seed), []
    for i in ids:
        kind = draw.choice("rdi") if draw.random() < share else " "
        out += {"r": [draw.randrange(4, VOCAB)], "d": [], "i": [i, draw.randrange(4, VOCAB)], " ": [i]}[kind]
    return out or [4]


def decoded(scripts, sources, **arguments):
    """A scripted model's rows, its passes, and the statistics."""
    model = said(scripts)
    given = {"tokens": torch.full((len(scripts), 1), BOS)}
    result = Speculative(Given(sources, **arguments), max_new_tokens=60, debug=True)(model, given)
    return [t[0] for t in result.tokens], model.decoder.passes, result.stats


# ---- the rule
@pytest.mark.parametrize(
    ("emitted", "place"), [([7], 3), ([9], 7), ([8, 5], 5), ([4], None), ([5, 6], None), ([8, 5, 6], 6), ([5], None)]
)
def test_oracle_3_rematch_fixtures(emitted, place):
    found = Alignment(X, 3, 0).rematch(emitted)
    assert (found[0] if len(found) == 1 else None) == place


def proposed(emitted, source=X, budget=64, **arguments):
    drafter = Given([source], **{**PAPER, **arguments})
    drafter.begin(said([[]]).decoder, [[BOS]], None)
    return drafter.propose(0, [BOS, *emitted], budget)


def test_a_draft_runs_to_the_end_of_the_source_or_to_its_limit():
    assert proposed([4, 7]) == Draft.chain([8, 5, 6, 9])
    assert proposed([4, 7], max_draft=2) == proposed([4, 7], budget=2) == Draft.chain([8, 5])
    assert proposed([4, 9]) is None and proposed([4, 4]) is None and proposed([4, 5]) is None


def test_the_start_of_the_output_is_the_start_of_the_source_even_where_its_token_comes_again():
    assert proposed([5]) == Draft.chain([6, 7, 8, 5, 6, 9])


def test_several_places_draft_the_nearest_or_all_as_a_tree():
    assert proposed([4, 4, 5], multiple="nearest") == Draft.chain([6, 7, 8, 5, 6, 9])
    assert proposed([4, 4, 4, 4, 4, 5], multiple="nearest") == Draft.chain([6, 9])
    tree = proposed([4, 4, 5], multiple="tree")
    assert (tree.tokens[:3], tree.parents[:3]) == ([6, 7, 9], [-1, 0, 0])


def test_a_tree_keeps_equal_starts_once_and_shares_its_nodes():
    assert merged([[6, 7, 8], [6, 9]], 9) == Draft([6, 7, 9, 8], [-1, 0, 0, 1])
    assert merged([[6, 7, 8], [6, 9]], 3) == Draft([6, 7, 9], [-1, 0, 0])
    assert merged([[]], 3) is None


def test_resuming_goes_on_as_if_a_token_had_been_replaced():
    drafter = Given([X], resume=True, adapt=False)
    drafter.begin(said([[]]).decoder, [[BOS]], None)
    assert drafter.propose(0, [BOS, 5], 64) == Draft.chain(X[1:])
    assert drafter.propose(0, [BOS, 5, 6, 4], 64) == Draft.chain(X[3:])


def test_drafts_get_shorter_where_edits_are_dense_and_longer_where_there_are_none():
    at = Alignment(X, 3, 0)
    for _ in range(40):
        at.note(1, True)
    dense = at.reach
    for _ in range(60):
        at.note(at.reach, False)
    assert dense == 7 and at.reach > 31


# ---- the same ids
@functools.cache
def truth_of(name):
    return greedy(toy(name), batch(name, rows()), 20)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("arguments", SETTINGS, ids=str)
def test_oracle_1_ids_equal_greedys_and_passes_are_no_more(name, arguments):
    model, sources = toy(name), rows()
    given = batch(name, sources)
    plain = truth_of(name)
    truth = [t[0] for t in plain.tokens]
    for copied in (sources, [slips(t, i) for i, t in enumerate(truth)]):
        result = Speculative(Given(copied, **arguments), max_new_tokens=20, debug=True)(model, given)
        assert result.tokens == plain.tokens and result.finish == plain.finish
        assert result.stats.target_forwards <= plain.stats.target_forwards
    assert result.stats.accepted > 10  # what was copied was right


@pytest.mark.parametrize("name", ["own seq2seq", "bart", "gpt2"])
def test_oracle_6_a_batch_equals_its_rows_one_by_one(name):
    model, sources = toy(name), rows()
    given = batch(name, sources)
    copied = [slips(t[0], i) for i, t in enumerate(greedy(model, given).tokens)]
    together = Speculative(Given(copied), max_new_tokens=30)(model, given).tokens
    for i, source in enumerate(sources):
        alone = Speculative(Given(copied[i : i + 1]), max_new_tokens=30)(model, batch(name, [source])).tokens
        assert alone[0] == together[i]


@pytest.mark.parametrize("name", ["own seq2seq", "t5"])
def test_losslessness_is_proven_by_the_kit_on_the_batchs_own_sources(name):
    given = batch(name, rows())
    assert_lossless(toy(name), Speculative(SourceCopy(), max_new_tokens=20), [[]] * 5, batch=2, **given)


def test_it_joins_prompt_copy_in_a_union():
    model, given = toy("bart"), batch("bart", rows())
    result = Speculative(DraftUnion([SourceCopy(), PromptCopy()]), max_new_tokens=30, debug=True)(model, given)
    assert result.tokens == greedy(model, given).tokens


# ---- passes
@pytest.mark.parametrize(
    ("arguments", "length", "want"),
    [(PAPER, 1, 1), (PAPER, 7, 1), (PAPER, 40, 1), ({"adapt": False}, 40, 1), ({}, 7, 1), ({}, 40, 2)],
)
def test_oracle_2_an_output_equal_to_its_source_takes_one_pass(arguments, length, want):
    source = [random.Random(length).randrange(4, VOCAB) for _ in range(length)]
    tokens, passes, stats = decoded([source], [source], **arguments)
    assert tokens == [[*source, EOS]] and passes == want  # adapting begins with a draft of 15
    assert stats.accepted == length - want  # the first token is the prefill's, EOS and each bonus the model's own


def test_an_edit_costs_at_most_two_passes_by_the_papers_rule_and_one_when_resuming():
    source = list(range(4, 44))
    script = [*source[:12], 45, *source[13:30], 46, *source[31:]]
    assert decoded([script], [source], **PAPER)[1] == 5  # one, and two for each edit
    assert decoded([script], [source], adapt=False)[1] == 3


def test_an_unrelated_source_gains_nothing_and_costs_no_pass():
    draw = random.Random(3)
    script = [draw.randrange(25, VOCAB) for _ in range(40)]
    source = [draw.randrange(4, 25) for _ in range(40)]
    assert decoded([script], [source])[1] == 40


def test_oracle_6_an_end_inside_the_accepted_part_ends_there_and_a_limit_cuts_exactly():
    source = [5, 6, 7, EOS, 8, 9]
    tokens, _, _ = decoded([source], [source])
    assert tokens == [[5, 6, 7, EOS]]
    model, given = said([list(range(4, 30))]), {"tokens": torch.tensor([[BOS]])}
    for limit in (0, 1, 7):
        result = Speculative(Given([list(range(4, 30))]), max_new_tokens=limit)(model, given)
        assert result.tokens[0][0] == list(range(4, 4 + limit)) and result.finish[0] == ["length"]


def test_an_end_token_behind_the_source_is_not_copied():
    tokens, passes, _ = decoded([[5, 6, 7, 8]], [[5, 6, 7, 8, EOS]])
    assert tokens == [[5, 6, 7, 8, EOS]] and passes == 1


@pytest.mark.parametrize("name", ["own seq2seq", "bart", "t5"])
def test_oracle_7_the_source_is_encoded_once_and_its_keys_are_never_touched(name, monkeypatch):
    model, given = toy(name), batch(name, rows((9,)))
    encoder = model.encoder if model.encoder is not None else model.decoder.module.get_encoder()
    calls, held = [], {}
    hook = encoder.register_forward_hook(lambda *_: calls.append(1))
    opened = type(model.decoder).open

    def spy(self, *args, **kwargs):
        held["state"] = opened(self, *args, **kwargs)
        held["before"] = crossed(held["state"])
        return held["state"]

    monkeypatch.setattr(type(model.decoder), "open", spy)
    truth = greedy(model, given).tokens[0][0]
    calls.clear()
    Speculative(Given([slips(truth)]), max_new_tokens=30)(model, given)
    hook.remove()
    assert len(calls) == 1
    after = crossed(held["state"])
    assert len(after) == 4 and all(a is b for a, b in zip(held["before"], after))


def crossed(state):
    """Cross-attention keys and values of both layers."""
    if isinstance(state.cache, list):
        return [t for pair in state.extras["source"].made.values() for t in pair]
    return [t for layer in state.cache.cross.layers for t in (layer.keys, layer.values)]


# ---- causal models
@pytest.mark.parametrize("name", CAUSAL)
def test_oracle_9_drafts_never_leave_the_marked_slice(name):
    model, seen = toy(name), []

    class Watched(SourceCopy):
        def propose(self, row, context, budget):
            draft = super().propose(row, context, budget)
            seen.extend((row, t) for t in (draft.tokens if draft else []))
            return draft

    given = batch(name, rows())
    given["source_span"] = torch.tensor([[2, 3], [1, 5], [1, 2], [0, 0], [10, 20]])
    result = Speculative(Watched(), max_new_tokens=30)(model, given)
    assert result.tokens == greedy(model, given).tokens
    slices = [given["tokens"][i, a:b].tolist() for i, (a, b) in enumerate(given["source_span"].tolist())]
    assert seen and all(token in slices[row] for row, token in seen)
    assert not any(row == 3 for row, _ in seen)


# ---- sampling, processors
def test_sampling_once_keeps_the_law():
    class Always(SourceCopy):
        def propose(self, row, context, budget):
            return Draft.chain([2, 2])

    torch.manual_seed(0)
    table = torch.randn(5)

    class Law(type(said([[]]).decoder)):
        def _at(self, row, place):
            return table

    law = SimpleNamespace(decoder=Law([[]], vocab=5, eos_ids=()), encoder=None)
    law.decoder.scripts = [[]] * 500
    sampler = Speculative(Always(), SampleOnce(), max_new_tokens=2)
    sampler.drafter.begin = lambda *_: None
    sampler.drafter.observe = lambda *_: None
    assert chi_square(law, sampler, [1], torch.softmax(table, 0).tolist(), draws=3000) > 0.001


def test_processors_apply_at_each_place_with_its_own_prefix():
    script = list(range(10, 40))
    seen = []

    class Forbid(torch.nn.Module):
        def forward(self, prefix, logits):
            seen.append(tuple(prefix))
            logits = logits.clone()
            if prefix[-1] == 14:  # behind 14 only 44 may come
                logits[:] = -torch.inf
                logits[44] = 0.0
            return logits

    model, given = said([script]), {"tokens": torch.tensor([[BOS]])}
    sampler = Speculative(Given([script]), processors=[Forbid()], max_new_tokens=12)
    tokens = sampler(model, given).tokens[0][0]
    assert tokens == [*range(10, 15), 44, *range(16, 22)]
    assert (BOS, *range(10, 14)) in seen


# ---- bad input
def bound(source, target, **arguments):
    encoder = SimpleNamespace(sizes=lambda: {"vocab_size": source})
    decoder = said([[]]).decoder
    decoder._caps = decoder._caps.__class__(target)
    SourceCopy(**arguments).bind(SimpleNamespace(encoder=encoder, decoder=decoder, sampler=None, spec={}))


def test_two_vocabularies_need_a_map():
    with pytest.raises(ConfigError, match=r"shared vocabulary \(source 8000, target 6000\); pass id_map"):
        bound(8000, 6000)
    bound(8000, 6000, id_map={1: 2})
    bound(6000, 6000)
    with pytest.raises(ConfigError, match=r"source 71, target 50"):
        decoded([[5]], [[70, 5]])


@pytest.mark.parametrize("given", [{40: 5, 41: 6, 43: 8}, {"40": 5, "41": 6, "43": 8}])
def test_an_id_map_names_what_may_be_copied(given):
    drafter = Given([[40, 41, 42, 43]], id_map=given, **PAPER)
    drafter.begin(said([[]]).decoder, [[BOS]], None)
    assert drafter.propose(0, [BOS, 5], 64) == Draft.chain([6])
    assert drafter.propose(0, [BOS, 5, 6], 64) is None
    assert Given([[1]], id_map=[4, 9]).id_map == {0: 4, 1: 9}


def test_an_empty_source_decodes_plainly():
    tokens, passes, stats = decoded([[5, 6, 7]], [[]])
    assert tokens == [[5, 6, 7, EOS]] and passes == 3 and stats.drafted == 0


def test_a_source_longer_than_the_models_positions_is_cut():
    source = list(range(4, 44))
    model = said([source], positions_max=21)
    result = Speculative(Given([source]), max_new_tokens=60, debug=True)(model, {"tokens": torch.tensor([[BOS]])})
    assert result.tokens[0][0] == source[:20] and result.finish == [["length"]]


def test_beams_are_refused():
    model = SimpleNamespace(encoder=None, decoder=None, spec={}, sampler=SimpleNamespace(beams=3))
    with pytest.raises(ConfigError, match="Aggressive decoding is defined for greedy, not beams"):
        SourceCopy().bind(model)


def test_a_left_padded_source_without_a_mask_is_refused():
    model, given = toy("own seq2seq"), batch("own seq2seq", [[0, 0, 5, 6, 7]])
    del given["source_mask"]
    with pytest.raises(DataError, match="source 0 begins with padding .id 0.: pass source_mask"):
        Speculative(SourceCopy())(model, given)


def test_data_without_a_source_is_refused_and_a_batch_without_one_decodes_plainly():
    sampler = Speculative(SourceCopy(), max_new_tokens=5)
    model = Model(decoder=CausalLM(16, 1, 2), sampler=sampler, spec=SPEC)
    with pytest.raises(ConfigError, match="SourceCopy reads the field source or source_span; TextTokens offers tokens"):
        check_fields(model, ("tokens", "mask"), "TextTokens", "predict")
    assert sampler(toy("gpt2"), {"tokens": torch.tensor([[5, 6]])}).stats.drafted == 0


@pytest.mark.parametrize(
    ("arguments", "said_"),
    [({"max_gram": 0}, "at least 1"), ({"max_draft": 0}, "at least 1"), ({"multiple": "all"}, "unique, nearest, tree")],
)
def test_bad_arguments_are_refused(arguments, said_):
    with pytest.raises(ConfigError, match=said_):
        SourceCopy(**arguments)
