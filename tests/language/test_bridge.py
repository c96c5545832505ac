"""Our samplers as the decoding method of transformers' ``generate``."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from tests.language.hf_toys import SEQ2SEQ, toy

from quire.errors import ConfigError
from quire.roles.language.accept import SampleOnce
from quire.roles.language.bridge import as_custom_generate
from quire.roles.language.drafters import PromptCopy
from quire.roles.language.loop import Greedy, Sample, Speculative

MODELS = ("llama", "gpt2", "mistral", "bart", "t5")
COPY = as_custom_generate(Speculative(PromptCopy()))


def asked(rows=3):
    """Ids [B,9] with the first row padded on the left, and generate's arguments."""
    ids = torch.randint(4, 60, (rows, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if rows > 1:
        ids[0, :4], mask[0, :4] = 0, 0
    return {"inputs": ids, "attention_mask": mask, "max_new_tokens": 20, "do_sample": False}


def generate(name, custom=None, **more):
    """generate, with the plain greedy method or another."""
    return toy(name).decoder.module.generate(
        **{**asked(), **more}, **({} if custom is None else {"custom_generate": custom})
    )


@pytest.mark.parametrize("name", MODELS)
def test_generate_gives_the_same_ids_in_fewer_passes(name):
    want, got = generate(name, eos_token_id=None), generate(name, COPY, eos_token_id=None)
    assert torch.equal(want, got)
    assert got.stats.accepted > 0 and got.stats.rows == 3
    assert got.stats.steps < 3 * 19


@pytest.mark.parametrize(
    "more",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"eos_token_id": [3, 5, 7, 20]},
        {"min_new_tokens": 9, "eos_token_id": [3, 5, 7, 20]},
        {"bad_words_ids": [[7], [9, 5]]},
        {"max_new_tokens": 1},
        {"num_return_sequences": 1, "max_length": 15, "max_new_tokens": None},
        {"prefix_allowed_tokens_fn": lambda row, ids: [4 + row, 20 + int(ids[-1]) % 7, 40 + row]},
    ],
    ids=lambda more: next(iter(more)),
)
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_generates_own_settings_hold(name, more):
    assert torch.equal(generate(name, **more), generate(name, COPY, **more))


def test_generates_own_stopping_criteria_hold():
    def even(ids, scores, **_):
        return (ids[:, -1] % 7 == 0) & (ids[:, -2] % 2 == 0)

    want = generate("llama", stopping_criteria=[even])
    assert torch.equal(want, generate("llama", COPY, stopping_criteria=[even]))
    assert want.shape[1] < 29 or (want == 0)[:, 9:].any()


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_an_output_object_carries_the_statistics(name):
    got = generate(name, COPY, return_dict_in_generate=True)
    kind = "GenerateEncoderDecoderOutput" if name in SEQ2SEQ else "GenerateDecoderOnlyOutput"
    assert type(got).__name__ == kind
    assert torch.equal(got.sequences, generate(name)) and got.stats.new_tokens > 0


def test_sampling_settings_of_generate_shape_the_law():
    sampled = as_custom_generate(Speculative(PromptCopy(), SampleOnce()))
    nearly_greedy = generate("llama", sampled, do_sample=True, top_k=1)
    assert torch.equal(nearly_greedy, generate("llama"))
    free = [generate("llama", as_custom_generate(Sample(seed=s)), do_sample=True) for s in (0, 0, 1)]
    assert torch.equal(free[0], free[1]) and not (free[0].shape == free[2].shape and torch.equal(free[0], free[2]))


def test_a_streamer_gets_every_id_once():
    class Kept(list):
        ended = False

        def put(self, ids):
            self.extend(ids.flatten().tolist())

        def end(self):
            self.ended = True

    streamer = Kept()
    got = generate("gpt2", as_custom_generate(Greedy(), streamer), **asked(1))
    assert streamer == got[0, 9:].tolist() and streamer.ended
    with pytest.raises(ConfigError, match="a streamer takes one row, the batch has 3"):
        generate("gpt2", as_custom_generate(Greedy(), streamer))


def test_the_trial_of_a_model_runs_once(monkeypatch):
    calls = []
    monkeypatch.setattr("quire.roles.language.hf_trial.trial", lambda model: calls.append(model) or {})
    method = as_custom_generate(Greedy())
    generate("gpt2", method)
    generate("gpt2", method)
    assert len(calls) == 1


def test_the_sampler_stays_as_it_was():
    sampler = Speculative(PromptCopy(), max_new_tokens=5)
    generate("gpt2", as_custom_generate(sampler), repetition_penalty=1.5)
    assert sampler.max_new_tokens == 5 and sampler.shape is None and sampler.rule is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"num_beams": 2}, "speculative decoding is defined for greedy or sampling, not beams: set num_beams=1"),
        ({"do_sample": True}, "generate asks for sampling, the sampler's acceptance is Exact"),
        ({"cache_implementation": "static"}, "speculative decoding needs a croppable cache, not StaticCache"),
        ({"output_scores": True, "return_dict_in_generate": True}, "set output_scores=False"),
        ({"guidance_scale": 1.5}, "takes no guidance_scale"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_loop_would_ignore_is_refused(more, said):
    with pytest.raises(ConfigError, match=said):
        generate("llama", COPY, **more)


def test_a_filled_cache_is_refused():
    from transformers import DynamicCache

    module = toy("llama").decoder.module
    cache = DynamicCache(config=module.config)
    given = asked()
    module(given["inputs"][:, :5], cache=cache, use_cache=True)
    with pytest.raises(ConfigError, match="pass no cache that holds tokens already"):
        generate("llama", COPY, cache=cache)


def test_what_is_no_language_sampler_is_refused():
    with pytest.raises(ConfigError, match="as_custom_generate takes Speculative, Greedy or Sample, got PromptCopy"):
        as_custom_generate(PromptCopy())
    with pytest.raises(ConfigError, match="give generate a StopStringCriteria"):
        as_custom_generate(Greedy(stop=["x"]))
