"""What people give the language role that can't be: one sentence each, nothing hangs, nothing emitted is retracted."""

from __future__ import annotations

import pytest
import torch
from tests.language.toys import EOS, VOCAB, Gambler, batch, language_model, prompts

from quire import ConfigError, Model
from quire.contracts import Spec, build
from quire.roles.language.accept import Exact, SampleOnce
from quire.roles.language.beam import BeamSearch
from quire.roles.language.contract import Acceptance, Draft, Drafter
from quire.roles.language.drafters import PromptCopy, Scripted, SmallModel
from quire.roles.language.loop import Greedy, Sample, Speculative
from quire.roles.language.models import CausalLM
from quire.roles.language.ngrams import NGramStore
from quire.roles.language.proof import assert_lossless
from quire.roles.latent.mlp import MlpVectorDecoder

SAMPLERS = {
    "greedy": lambda **more: Greedy(**more),
    "sample": lambda **more: Sample(**more),
    "drafts": lambda **more: Speculative(PromptCopy(), **more),
    "beams": lambda **more: BeamSearch(**more),
}
EVERY = pytest.mark.parametrize("sampler", SAMPLERS)


def sentence(error):
    """The refusal, which is one line."""
    assert "\n" not in str(error.value)
    assert 20 < len(str(error.value)) < 300
    return str(error.value)


# ---- prompts
@EVERY
def test_an_empty_prompt_without_a_start_token_is_named_by_its_place(sampler):
    given = batch([*prompts((3, 4, 5)), [9]])
    given["mask"][3] = False
    with pytest.raises(ConfigError) as error:
        SAMPLERS[sampler]()(language_model(bos=None), given)
    assert sentence(error) == "prompt 3 is empty and the tokenizer has no start token"
    made = SAMPLERS[sampler](max_new_tokens=3)(language_model(eos=None), given)  # with one it starts there
    assert [len(row[0]) for row in made.tokens] == [3, 3, 3, 3]


@EVERY
@pytest.mark.parametrize("tokens", [64, 65])
def test_a_prompt_as_long_as_the_context_or_longer_is_named_with_both_lengths(sampler, tokens):
    with pytest.raises(ConfigError) as error:
        SAMPLERS[sampler]()(language_model("learned"), batch([*prompts((3,)), *prompts((tokens,))]))
    assert sentence(error) == f"prompt 1 has {tokens} tokens; the model takes 64"
    with pytest.raises(ConfigError, match="prompt 0 has 9 tokens; the model takes 8"):
        SAMPLERS[sampler](max_total=8)(language_model(), batch(prompts((9,))))


@EVERY
def test_padding_on_either_side_gives_the_same_and_the_pad_id_decides_nothing(sampler):
    model, rows = language_model(eos=None), [[0, 5, 0], [7], [0, 0, 8, 9, 0]]  # pad ids inside real text
    right, left = (SAMPLERS[sampler](max_new_tokens=6)(model, batch(rows, side)) for side in ("right", "left"))
    assert right.tokens == left.tokens
    for place, row in enumerate(rows):
        alone = SAMPLERS[sampler](max_new_tokens=6)(model, {**batch([row]), "index": torch.tensor([place])})
        assert right.tokens[place] == alone.tokens[0]


def test_a_negative_limit_is_named():
    for sampler in ("greedy", "sample", "drafts", "beams"):
        with pytest.raises(ConfigError) as error:
            SAMPLERS[sampler](max_new_tokens=-1)
        assert "max_new_tokens" in sentence(error)


# ---- ends inside a draft
def test_an_end_or_the_limit_inside_a_draft_ends_there_and_nothing_follows():
    model, rows = language_model(eos=None), prompts((5, 4))
    truth = [r[0] for r in Greedy(20)(model, batch(rows)).tokens]
    end = truth[0][6]
    ending = language_model(eos=end)
    plain = Greedy(20)(ending, batch(rows))
    drafted = Speculative(Gambler(rows, truth), max_new_tokens=20, debug=True)(ending, batch(rows))
    assert drafted.tokens == plain.tokens
    assert drafted.tokens[0][0] == truth[0][: truth[0].index(end) + 1]
    assert (drafted.finish[0], drafted.finish) == (["eos"], plain.finish)
    for limit in (0, 1, 7):
        cut = Speculative(Scripted(truth[0], 10), max_new_tokens=limit)(model, batch(rows[:1]))
        assert (cut.tokens, cut.finish) == ([[truth[0][:limit]]], [["length"]])
    assert EOS not in drafted.tokens[0][0][:-1]


# ---- streaming
@pytest.mark.parametrize("sampler", ["greedy", "sample", "drafts"])
def test_a_consumer_that_stops_early_breaks_nothing(sampler):
    model, rows = language_model(eos=None), prompts()
    made = SAMPLERS[sampler](max_new_tokens=12)
    want = made(model, batch(rows)).tokens
    for taken in (0, 1, 5, 9):
        events, seen = made.stream(model, batch(rows)), [[] for _ in rows]
        for _ in range(taken):
            row, new = next(events)
            seen[row] += new
        events.close()
        for got, (whole,) in zip(seen, want):
            assert got == whole[: len(got)]  # a prefix of the result: nothing is taken back
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    assert made(model, batch(rows)).tokens == want  # and the next call is as fresh as ever


def test_a_drafter_that_fails_ends_the_stream_with_its_own_error_and_keeps_what_was_emitted():
    class Breaks(Drafter):
        def propose(self, row, context, budget):
            if len(context) > 8:
                raise RuntimeError("out of guesses")

    model, rows = language_model(eos=None), prompts((5,))
    want, seen = Greedy(12)(model, batch(rows)).tokens[0][0], []
    events = Speculative(Breaks(), max_new_tokens=12).stream(model, batch(rows))
    with pytest.raises(RuntimeError, match="out of guesses"):
        seen.extend(token for _, new in events for token in new)
    assert seen == want[:4]


# ---- pairs that can't be
def test_vocabularies_that_differ_are_both_named(tmp_path):
    store = NGramStore([1])
    store.add([[4, 5, 6]], 40, "aaa")
    file = store.save(tmp_path / "n.safetensors")
    with pytest.raises(ConfigError) as error:
        Speculative(PromptCopy(corpus=NGramStore([1], str(file))))(language_model(), batch(prompts((3,))))
    assert "vocabulary 40 (aaa), the model has 50" in sentence(error)
    with pytest.raises(ConfigError) as error:
        Speculative(SmallModel(language_model(vocab_size=60).decoder))(language_model(), batch(prompts((3,))))
    assert "the drafter has 60 tokens, the model 50" in sentence(error)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(Exception, match="n.safetensors is not an n-gram store, or is damaged") as error:
        NGramStore([1], str(file))
    sentence(error)


def test_temperature_zero_is_refused_also_with_a_nucleus():
    for make in (lambda: Sample(temperature=0, top_p=0.9), lambda: SampleOnce(temperature=0, top_p=0.9)):
        with pytest.raises(ConfigError) as error:
            make()
        assert "temperature must be above 0, got 0: use Exact" in sentence(error)
    with pytest.raises(ConfigError, match=r"top_p must be in \(0, 1\], got 1.5"):
        Sample(top_p=1.5)


def test_a_sampler_without_a_step_model_is_refused_when_the_model_is_made():
    for sampler in SAMPLERS:
        with pytest.raises(ConfigError) as error:
            Model(decoder=MlpVectorDecoder(), sampler=SAMPLERS[sampler]())
        assert "needs a StepModel; model.decoder is MlpVectorDecoder (core)" in sentence(error)


def test_a_model_without_a_needed_capability_is_named_with_the_reason():
    class Fork(Drafter):
        def propose(self, row, context, budget):
            return Draft([4, 5], [-1, -1])

    model = language_model()
    caps = model.decoder.caps()
    model.decoder._caps = type(caps)(**{**vars(caps), "tree_mask": False})
    with pytest.raises(ConfigError) as error:
        Speculative(Fork())(model, batch(prompts((3,))))
    assert sentence(error).startswith(
        "Speculative with Fork needs tree_mask; the decoder has none: use a chain drafter"
    )
    with pytest.raises(ConfigError) as error:
        Sample(cfg=2.0)(model, batch(prompts((3,))))
    assert "Sample.cfg needs a model with a null class: CausalLM has none" in sentence(error)
    with pytest.raises(ConfigError) as error:
        BeamSearch(drafter=Fork())
    assert "speculative decoding is defined for greedy or sampling, not beams" in sentence(error)


def test_a_rule_that_is_not_lossless_has_nothing_to_prove():
    class Loose(Acceptance):
        pass

    with pytest.raises(ConfigError) as error:
        assert_lossless(language_model(), Speculative(acceptance=Loose()), prompts((3,)))
    assert "Loose declares lossless=False" in sentence(error)
    assert Exact.lossless


def test_a_stop_string_without_a_tokenizer_and_a_broken_drafts_ids_are_named():
    for sampler in SAMPLERS:
        with pytest.raises(ConfigError, match="sampler.stop needs a tokenizer"):
            SAMPLERS[sampler](stop=["x"])(language_model(), batch(prompts((3,))))

    class Stray(Drafter):
        def propose(self, row, context, budget):
            return Draft.chain([VOCAB])

    with pytest.raises(ConfigError) as error:
        Speculative(Stray())(language_model(), batch(prompts((3,))))
    assert f"Stray proposed the id {VOCAB}; the model has {VOCAB} tokens" in sentence(error)


def test_a_model_whose_sizes_the_data_does_not_say_is_named():
    with pytest.raises(ConfigError, match="CausalLM needs 'vocab_size' from the data's spec"):
        build(CausalLM(width=16, depth=1, heads=2), Spec())
