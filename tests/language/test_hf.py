"""Adapters to transformers: the oracles of the language role, with ``generate`` as the reference."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from tests.language.hf_toys import (
    CHAINS,
    CONFIGS,
    EOS,
    SEQ2SEQ,
    VOCAB,
    WHOLE,
    ThreeChains,
    adapter,
    batch,
    new_tokens,
    prompts,
    reference,
    toy,
    whole,
)

from quire.contracts import Spec, build
from quire.errors import ConfigError
from quire.roles.language.accept import SampleOnce
from quire.roles.language.drafters import PromptCopy, Scripted, SelfDraft
from quire.roles.language.hf import HFCausal
from quire.roles.language.loop import Greedy, Speculative


def starts(name):
    return [1 if name in SEQ2SEQ else len(p) for p in prompts()]


def opened(name, row=3):
    """A state behind one prompt, its ids and the codes."""
    model = toy(name).decoder
    given = batch(name, [prompts()[row]])
    codes = model.encode(given)
    ids = given["tokens"][0].tolist() if codes is None else [model.caps().start_id]
    with torch.no_grad():
        return model, model.open(torch.tensor([ids]), codes=codes, max_length=64), ids, codes


# ---- oracle 1
@pytest.mark.parametrize("name", WHOLE + CHAINS)
def test_greedy_is_generates_greedy(name):
    count = 32
    model, want = toy(name, None), reference(name, count, None)
    got = Greedy(max_new_tokens=count)(model, batch(name, prompts()))
    assert new_tokens(got) == want
    assert [len(row) for row in want] == [count] * 5
    rows = 1 if model.decoder.caps().batch else 5
    assert got.stats.target_forwards == rows * (count - 1)  # one prefill and N-1 steps


@pytest.mark.parametrize("name", WHOLE)
def test_greedy_ends_where_generate_ends(name):
    assert new_tokens(Greedy(max_new_tokens=32)(toy(name), batch(name, prompts()))) == reference(name)


# ---- oracle 2
@pytest.mark.parametrize("name", WHOLE)
def test_embedding_of_the_argmax_decodes_as_its_id(name):
    want = reference(name, 12, None)
    for row in range(5):
        model, state, _, _ = opened(name, row)
        got = [int(state.logits[0].argmax())]
        with torch.no_grad():
            while len(got) < 12:
                logits = model.step(state, None, embeds=model.embed(torch.tensor([got[-1:]])))
                model.keep(state, torch.tensor([[0]]))
                got.append(int(logits[0, 0].argmax()))
        assert got == want[row]


# ---- oracle 3
@pytest.mark.parametrize("name", WHOLE)
def test_tree_of_three_chains_decodes_as_greedy(name):
    want = reference(name, 32, None)
    passes = 0
    for row in range(5):
        drafter = ThreeChains([starts(name)[row]], [want[row]])
        one = Speculative(drafter, max_new_tokens=32, debug=True)(toy(name, None), batch(name, [prompts()[row]]))
        assert new_tokens(one) == [want[row]]
        passes += one.stats.target_forwards
    assert passes <= 80  # about 70 of 160 were measured


# ---- oracle 4
@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_a_skipped_layer_decodes_as_without_cache(skipped, monkeypatch):
    model = adapter("llama")
    model.caps()
    monkeypatch.setattr(model.iter_layers()[skipped], "forward", lambda hidden_states, **_: hidden_states)
    prompt, more = [7, 9, 30, 4, 22], [5, 17, 8]
    with torch.no_grad():
        state = model.open(torch.tensor([prompt]))
        for token in more:
            logits = model.step(state, torch.tensor([[token]]))
            model.keep(state, torch.tensor([[0]]))
    torch.testing.assert_close(logits[0, 0], whole(model, None, prompt + more)[-1], atol=1e-4, rtol=1e-4)


# ---- oracle 6
@pytest.mark.parametrize("name", WHOLE)
def test_kept_path_is_a_fresh_prefill(name):
    model, state, ids, codes = opened(name)
    tokens, parents = [10, 11, 12, 13, 14, 15, 16], [-1, 0, 0, 2, 2, 4, 0]
    with torch.no_grad():
        model.step(state, torch.tensor([tokens]), parents=torch.tensor([parents]))
        model.keep(state, torch.tensor([[0, 2, 4, -1]]))
        got = model.step(state, torch.tensor([[20]]))[0, 0]
    kept = [*ids, 10, 12, 14]
    assert state.lengths.tolist() == [len(kept)]
    torch.testing.assert_close(got, whole(model, codes, [*kept, 20])[-1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", WHOLE)
def test_permuted_rows_permute_logits_exactly(name):
    model, given = toy(name).decoder, batch(name, prompts((6, 6, 6)))
    codes = model.encode(given)
    ids = torch.full((3, 1), model.caps().start_id) if codes is not None else given["tokens"]
    order, new = torch.tensor([2, 0, 1]), torch.tensor([[4], [5], [6]])
    with torch.no_grad():
        state, other = model.open(ids, codes=codes), model.open(ids, codes=codes)
        model.rows(other, order)
        assert torch.equal(model.step(other, new[order]), model.step(state, new)[order])
        assert torch.equal(other.logits, state.logits[order])


@pytest.mark.parametrize("name", WHOLE)
def test_cut_forgets_what_is_behind(name):
    model, state, ids, codes = opened(name)
    with torch.no_grad():
        model.step(state, torch.tensor([[10, 11, 12]]))
        model.keep(state, torch.tensor([[0, 1, 2]]))
        model.cut(state, torch.tensor([len(ids) + 1]))
        got = model.step(state, torch.tensor([[20]]))[0, 0]
    torch.testing.assert_close(got, whole(model, codes, [*ids, 10, 20])[-1], atol=1e-4, rtol=1e-5)


# ---- oracle 7
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", WHOLE + CHAINS)
def test_ragged_batch_is_each_row_alone(name, side):
    model, want = toy(name), reference(name)
    got = Greedy(max_new_tokens=32)(model, batch(name, prompts(), side))
    assert new_tokens(got) == want
    assert got.stats.rows_looped == (0 if model.decoder.caps().batch else 5)
    if model.decoder.caps().tree_mask:
        drafter = ThreeChains(starts(name), want)
        assert (
            new_tokens(Speculative(drafter, max_new_tokens=32, debug=True)(model, batch(name, prompts(), side))) == want
        )
    copied = Speculative(PromptCopy(), max_new_tokens=32, debug=True)(model, batch(name, prompts(), side))
    assert new_tokens(copied) == want


def test_rows_that_end_early_do_not_change_the_others():
    want = reference("llama")
    assert len({len(row) for row in want}) > 1
    got = Greedy(max_new_tokens=32)(toy("llama"), batch("llama", prompts()))
    assert new_tokens(got) == want and len({reason for (reason,) in got.finish}) == 2


# ---- oracle 8
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_an_accepted_path_ends_at_the_end_token(name):
    truth = reference(name, 32, None)[0]
    ending = truth[2]  # second node of the first draft
    model = SimpleNamespace(decoder=type(toy(name).decoder).of(toy(name).decoder.module), encoder=None)
    model.decoder.generation = copy.copy(model.decoder.generation)
    model.decoder.generation.eos_token_id = [ending]
    got = Speculative(Scripted(truth), max_new_tokens=32)(model, batch(name, prompts()[:1]))
    assert new_tokens(got) == [truth[: truth.index(ending) + 1]]
    assert got.finish == [["eos"]]


@pytest.mark.parametrize("count", [0, 7])
def test_the_limit_is_exact_inside_a_draft(count):
    truth = reference("llama", 32, None)[0]
    got = Speculative(Scripted(truth, tokens=10), max_new_tokens=count)(
        toy("llama", None), batch("llama", prompts()[:1])
    )
    assert new_tokens(got) == [truth[:count]]
    assert got.finish == [["length"]] and got.stats.target_forwards == 0  # the prefill checked all of it


# ---- capabilities
@pytest.mark.parametrize("name", WHOLE + CHAINS)
def test_capabilities_are_offered_as_far_as_they_hold(name):
    caps = toy(name).decoder.caps()
    assert (caps.tree_mask, caps.batch) == ((True, True) if name in WHOLE else (False, False))
    assert caps.embeds and caps.vocab_size == VOCAB and caps.eos_ids == (EOS,)
    assert set(caps.lacks) == (set() if name in WHOLE else {"tree_mask", "batch"})
    assert caps.window == (6 if name in ("mistral", "qwen2") else None)


def test_a_model_that_ignores_positions_is_found_out(monkeypatch):
    model = adapter("llama")
    inner = model.module.model.forward
    monkeypatch.setattr(model.module.model, "forward", lambda *a, position_ids=None, **k: inner(*a, **k))
    caps = model.caps()
    assert not caps.tree_mask and not caps.batch
    assert caps.lacks["tree_mask"] == "llama does not keep to 4-D masks and given positions: use a chain drafter"


def test_a_model_whose_cache_lies_is_refused(monkeypatch):
    model = adapter("llama")
    inner = model.module.model.forward

    def late(*a, position_ids=None, **k):
        ids = torch.full((1, 1), 9).expand(len(k["input_ids"]), k["input_ids"].shape[1])
        return inner(*a, position_ids=ids if k["input_ids"].shape[1] > 1 else None, **k)

    monkeypatch.setattr(model.module.model, "forward", late)
    monkeypatch.setattr("quire.roles.language.hf_trial._whole", lambda *a: torch.zeros(3, VOCAB))
    with pytest.raises(ConfigError, match="^HFCausal can't step llama: its cache does not repeat a whole pass$"):
        model.caps()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_shallow_pass_is_the_first_layers(name):
    model = toy(name).decoder
    small = model.shallow(layers=1)
    assert len(small.iter_layers()) == 1 and len(model.iter_layers()) > 1
    assert small.iter_layers()[0] is model.iter_layers()[0]
    if name not in SEQ2SEQ:
        got = Speculative(SelfDraft({"layers": 1}, 3), max_new_tokens=32)(toy(name), batch(name, prompts()))
        assert new_tokens(got) == reference(name)
        assert got.stats.drafter_forwards > 0
    with pytest.raises(ConfigError, match="can be shallow by layers=1"):
        model.shallow(layers=9)


def test_full_acceptance_of_the_whole_depth_self_draft():
    depth = len(toy("llama", None).decoder.iter_layers())
    got = Speculative(SelfDraft({"layers": depth}, 3), max_new_tokens=32)(
        toy("llama", None), batch("llama", prompts()[:1])
    )
    assert got.stats.accepted == got.stats.drafted


def test_half_precision_steps_return_fp32():
    model = HFCausal(config={**CONFIGS["llama"], "vocab_size": VOCAB}, dtype="bfloat16")
    build(model, Spec())
    state = model.eval().open(torch.tensor([[4, 5, 6]]))
    assert model.module.dtype == torch.bfloat16
    assert state.logits.dtype == model.step(state, torch.tensor([[7]])).dtype == torch.float32


def test_cross_attention_keys_stay_as_they_were():
    model, state, _, _ = opened("bart")
    before = [layer.keys.clone() for layer in state.cache.cross.layers]
    with torch.no_grad():
        model.step(state, torch.tensor([[4, 5, 6]]), parents=torch.tensor([[-1, 0, 0]]))
        model.keep(state, torch.tensor([[0, 2, -1]]))
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, state.cache.cross.layers))


def test_the_source_is_encoded_once(monkeypatch):
    model = adapter("t5")
    model.caps()
    calls = []
    inner = model.module.encoder.forward
    monkeypatch.setattr(model.module.encoder, "forward", lambda *a, **k: calls.append(1) or inner(*a, **k))
    Greedy(max_new_tokens=8)(SimpleNamespace(decoder=model, encoder=None), batch("t5", prompts()))
    assert len(calls) == 1


# ---- sliding cache
@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_sliding_cache_decodes_chains_in_less_memory(name):
    model = toy(name, None, "sliding")
    want = reference(name, 32, None)
    for sampler in (Greedy(max_new_tokens=32), Speculative(PromptCopy(), max_new_tokens=32)):
        got = sampler(model, batch(name, prompts()))
        assert new_tokens(got) == want and got.stats.rows_looped == 5
    full = Greedy(max_new_tokens=32)(toy(name, None), batch(name, prompts()[3:4]))
    small = Greedy(max_new_tokens=32)(model, batch(name, prompts()[3:4]))
    assert small.stats.cache_bytes_peak < full.stats.cache_bytes_peak


def test_trees_and_cuts_need_the_full_cache():
    model = toy("mistral", None, "sliding")
    drafter = ThreeChains(starts("mistral"), reference("mistral", 32, None))
    with pytest.raises(
        ConfigError, match="ThreeChains needs tree_mask; tree drafts need full-length cache; window is 6"
    ):
        Speculative(drafter)(model, batch("mistral", prompts()))
    state = model.decoder.open(torch.tensor([prompts()[3]]))
    with pytest.raises(ConfigError, match="cutting tokens back needs full-length cache; window is 6"):
        model.decoder.cut(state, torch.tensor([4]))
    with pytest.raises(ConfigError, match="gpt2 has no sliding window; use full"):
        adapter("gpt2", cache="sliding")


# ---- training
def test_sampling_does_not_depend_on_the_draft():
    rows = [
        new_tokens(Speculative(drafter, SampleOnce(), max_new_tokens=24, seed=3)(toy("gpt2"), batch("gpt2", prompts())))
        for drafter in (None, PromptCopy())
    ]
    assert rows[0] == rows[1]  # one draw a token from the row's own stream, whatever was guessed
