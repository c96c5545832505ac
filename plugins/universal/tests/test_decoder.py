"""Oracles 7 and 9: causality, the cache, ragged rows and trees, and losslessness."""

import random
import warnings

import pytest
import torch

from quire.errors import ConfigError
from quire.roles.language.contract import Draft, Drafter
from quire.roles.language.drafters import PromptCopy, SelfDraft
from quire.roles.language.loop import Greedy, Speculative
from quire.roles.language.proof import assert_lossless, batch_of
from quire_universal.halting import ACT, GlobalACT, RandomSteps

SHAPES = {
    "plain": {},
    "post": {"norm": "post"},
    "rope": {"position": "rope"},
    "halves": {"layout": "halves", "step_signal": "sinusoid"},
    "learned": {"position": "learned", "tie": False},
    "own blocks": {"shared": False},
    "sepconv": {"transition": "sepconv"},
    "act": {"halting": (ACT, {})},
    "act run": {"halting": (ACT, {"halted": "run"})},
    "act basic": {"halting": (ACT, {"mode": "basic", "force_remainder": False})},
    "act sepconv": {"halting": (ACT, {}), "transition": "sepconv"},
    "act sepconv run": {"halting": (ACT, {"halted": "run"}), "transition": "sepconv"},
    "global": {"halting": (GlobalACT, {"bias": 1.0})},
    "global run": {"halting": (GlobalACT, {"halted": "run", "bias": 1.0})},
    "random": {"halting": (RandomSteps, {})},
}


def shape(name):
    given = dict(SHAPES[name])
    if "halting" in given:
        rule, how = given["halting"]
        given["halting"] = rule(**{"max_steps": 5, "bias": -1.0, **how})
    return given


def prompts(lengths=(3, 7, 1, 12, 5), seed=1):
    source = random.Random(seed)
    return [[source.randrange(4, 40) for _ in range(n)] for n in lengths]


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_oracle_7_later_tokens_do_not_change_earlier_outputs(decoder, name):
    found = decoder(**shape(name))
    tokens = torch.randint(4, 40, (2, 9))
    other = tokens.clone()
    other[:, 6:] = torch.randint(4, 40, (2, 3))
    assert torch.allclose(found(None, tokens)[:, :6], found(None, other)[:, :6], atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_oracle_7_cached_equals_uncached_token_by_token(decoder, name):
    found = decoder(**shape(name))
    tokens = torch.randint(4, 40, (3, 12))
    want, ponder = found.pondered(None, tokens)
    state = found.open(tokens[:, :3])
    got = [state.logits]
    for t in range(3, 12):
        got.append(found.step(state, tokens[:, t : t + 1])[:, 0])
        found.keep(state, torch.zeros(3, 1, dtype=torch.long))
    assert torch.allclose(want[:, 2:], torch.stack(got, 1), atol=1e-5)
    if ponder is not None:
        assert ponder.steps.min() < ponder.steps.max()


@torch.no_grad()
def test_oracle_7_a_token_that_runs_longer_finds_older_keys(decoder):
    found = decoder(halting=ACT(max_steps=6))
    tokens = torch.randint(4, 40, (64, 6))
    _, ponder = found.pondered(None, tokens)
    longer = ponder.steps[:, 5] > ponder.steps[:, :5].max(1).values
    assert longer.any()
    rows = tokens[longer]
    want = found(None, rows)[:, 5]
    for i, row in enumerate(rows):  # each alone: the loop of the first five stops early
        state = found.open(row[None, :5])
        assert torch.allclose(found.step(state, row[None, 5:])[0, 0], want[i], atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_ragged_rows_equal_each_alone_in_training_and_decoding(decoder, name, side):
    found = decoder(**shape(name))
    rows = prompts()
    fill = [[0] * (12 - len(r)) for r in rows]
    ids = torch.tensor([r + f if side == "right" else f + r for r, f in zip(rows, fill)])
    mask = torch.tensor([[bool(i) for i in row] for row in ids.tolist()])
    state = found.open(ids, mask)
    logits = found(None, ids, mask)
    steps = torch.randint(4, 40, (5, 3))
    after = found.step(state, steps)
    for i, row in enumerate(rows):
        whole = found(None, torch.tensor([row + steps[i].tolist()]))[0]
        assert torch.allclose(logits[i][mask[i]], whole[: len(row)], atol=1e-5)
        assert torch.allclose(state.logits[i], whole[len(row) - 1], atol=1e-5)
        assert torch.allclose(after[i], whole[len(row) :], atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_a_tree_sees_ancestors_only_and_keep_takes_any_path(decoder, name):
    found = decoder(**shape(name))
    rows = prompts((4, 6))
    state = found.open(*padded(rows))
    ids = torch.tensor([[10, 11, 12, 13, 14, 15, 10], [20, 21, 22, 23, 24, 25, 20]])
    parents = torch.tensor([[-1, 0, 0, 1, 2, 4, -1]] * 2)
    valid = torch.tensor([[True] * 6 + [False]] * 2)
    logits = found.step(state, ids, parents=parents, valid=valid)
    path = [0, 2, 4, 5]
    for i, row in enumerate(rows):
        whole = found(None, torch.tensor([row + ids[i, path].tolist()]))[0, len(row) :]
        assert torch.allclose(logits[i, path], whole, atol=1e-5)
    found.keep(state, torch.tensor([path, [0, 2, -1, -1]]))
    assert state.lengths.tolist() == [8, 8]
    found.rows(state, torch.tensor([1, 0, 1]))
    after = found.step(state, torch.tensor([[30], [31], [32]]))
    held = [rows[1] + ids[1, [0, 2]].tolist(), rows[0] + ids[0, path].tolist(), rows[1] + ids[1, [0, 2]].tolist()]
    for i, row in enumerate(held):
        assert torch.allclose(after[i, 0], found(None, torch.tensor([[*row, 30 + i]]))[0, -1], atol=1e-5)
    found.cut(state, torch.tensor([5, 5, 5]))
    again = found.step(state, torch.tensor([[33], [33], [33]]))
    assert torch.allclose(again[1, 0], found(None, torch.tensor([[*held[1][:5], 33]]))[0, -1], atol=1e-5)


def padded(rows):
    most = max(map(len, rows))
    ids = torch.tensor([r + [0] * (most - len(r)) for r in rows])
    return ids, ids > 0


class Guesser(Drafter):
    """Random trees whose right branch is often right."""

    def __init__(self, truth, seed=0):
        super().__init__()
        self.truth, self.chance = truth, random.Random(seed)

    def propose(self, row, context, budget):
        tokens, parents, above = [], [], -1
        for token in self.truth[row][len(context) :][:5]:
            right = token if self.chance.random() < 0.8 else self.chance.randrange(4, 40)
            tokens += [self.chance.randrange(4, 40), right]
            parents += [above, above]
            above = len(tokens) - 1
        return Draft(tokens, parents) if tokens else None


@pytest.mark.parametrize("name", ["plain", "learned", "act", "act run", "sepconv", "act sepconv", "global", "random"])
def test_oracle_9_speculation_is_lossless(decoder, whole, name):
    model = whole(decoder(**shape(name)))
    rows = prompts()
    for side in ({}, {"index": torch.arange(5)}):
        truth = Greedy(16)(model, batch_of(rows, model.decoder, side)).tokens
    truth = [p + t[0] for p, t in zip(rows, truth)]
    for drafter in (PromptCopy(), Guesser(truth), SelfDraft({"steps": 2}, tokens=3)):
        sampler = Speculative(drafter, max_new_tokens=16, debug=True)
        assert_lossless(model, sampler, rows)
        assert_lossless(model, sampler, rows, batch=1)


def test_oracle_9_two_steps_draft_and_six_verify(decoder, whole):
    model = whole(decoder(steps=6, std=0.1))
    sampler = Speculative(SelfDraft({"steps": 2}, tokens=3), max_new_tokens=24)
    assert_lossless(model, sampler, prompts())
    assert sampler(model, batch_of(prompts(), model.decoder, {})).stats.accepted > 0


def test_shallow_by_all_steps_is_the_model_and_other_ways_are_refused(decoder):
    found = decoder(steps=4)
    tokens = torch.randint(4, 40, (1, 5))
    assert torch.equal(found.shallow(steps=4)(None, tokens), found(None, tokens))
    assert not torch.equal(found.shallow(steps=2)(None, tokens), found(None, tokens)) and found.steps == 4
    with pytest.raises(ConfigError, match="step 5 > table 4: use step_signal sinusoid"):
        found.shallow(steps=5)
    for how in ({"layers": 2}, {"steps": 0}, {}):
        with pytest.raises(ConfigError, match="shallow by steps"):
            found.shallow(**how)
    decoder(step_signal="sinusoid").shallow(steps=9)(None, tokens)


@torch.no_grad()
def test_cross_attention_reads_the_source_and_its_padding_alone_is_masked(decoder, encoder):
    reads, found = encoder(), decoder(spec={"codes": {"width": 16}}, halting=ACT(max_steps=4, bias=-1.0))
    source = torch.randint(4, 40, (2, 6))
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    tokens = torch.randint(4, 40, (2, 5))
    whole = found(reads({"source": source, "source_mask": mask}), tokens)
    short = found(reads({"source": source[1:, :4]}), tokens[1:])
    assert torch.allclose(whole[1:], short, atol=1e-5)
    state = found.open(tokens[:, :2], None, reads({"source": source, "source_mask": mask}))
    assert torch.allclose(found.step(state, tokens[:, 2:]), whole[:, 2:], atol=1e-5)
    with pytest.raises(ConfigError, match="needs an encoder's tokens"):
        found(None, tokens)
    with pytest.raises(ConfigError, match="without an encoder"):
        decoder()(reads({"source": source}), tokens)


def test_the_encoders_width_may_differ(decoder, encoder):
    reads, found = encoder(width=8), decoder(spec={"codes": {"width": 8}})
    assert found(reads({"source": torch.randint(4, 40, (2, 6))}), torch.randint(4, 40, (2, 5))).shape == (2, 5, 40)


def test_positions_beyond_training_are_noticed_once(decoder):
    found = decoder()
    found.train()(None, torch.randint(4, 40, (1, 6)))
    found.eval()
    with pytest.warns(UserWarning, match="trained on 6 tokens and now reads 9"):
        found(None, torch.randint(4, 40, (1, 9)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found(None, torch.randint(4, 40, (1, 9)))


def test_bad_prompts_are_named(decoder, whole):
    found = decoder(position="learned", spec={"length": 4})
    with pytest.raises(ConfigError, match="prompt 0 has 5 tokens; the model takes 4"):
        found.open(torch.randint(4, 40, (1, 5)))
    with pytest.raises(ConfigError, match="prompt 1 has no real tokens"):
        found.open(torch.full((2, 2), 5), torch.tensor([[True, True], [False, False]]))
