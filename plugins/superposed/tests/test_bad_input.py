"""What is refused, each in one sentence that names the key and the remedy."""

import dataclasses

import pytest
from superposed_toys import VOCAB, batch, counted, language_model, prompts, saved

from quire.errors import ConfigError, DataError
from quire.roles.language.drafters import PromptCopy
from quire_superposed.metrics import DraftSet
from quire_superposed.presets import PRESETS
from quire_superposed.sampler import Superposed


class Named:
    """A tokenizer's fingerprint."""

    def __init__(self, fingerprint):
        self.fingerprint = fingerprint


REFUSED = {
    "temperature": ({"temperature": 0}, r"^Superposed: temperature must be > 0 \(got 0\); use Greedy for argmax$"),
    "tokens": ({"tokens": 2}, r"tokens \(2\) must be >= drafts \(3\)"),
    "alpha": ({"alpha": 1.5}, r"alpha .* in \[0, 1\].*got alpha 1.5"),
    "alpha below": ({"alpha": -0.1}, r"alpha .* in \[0, 1\]"),
    "floor": ({"ngram_floor": 2.0}, "ngram_floor 2"),
    "penalty": ({"penalty": -1.0}, "penalty -1"),
    "uneven": ({"lengths": [1, 2], "weights": [0.1]}, r"lengths \[1, 2\] and weights \[0.1\]"),
    "lengths alone": ({"lengths": [1, 2]}, r"lengths \[1, 2\] and weights"),
    "negative": ({"lengths": [1], "weights": [-0.1]}, r"lengths \[1\] and weights \[-0.1\]"),
    "heavy": ({"lengths": [1, 2], "weights": [0.9, 0.2]}, "at most 1 in sum"),
    "length 0": ({"lengths": [0], "weights": [0.1]}, "at least 1"),
    "repeated": ({"lengths": [2, 2], "weights": [0.1, 0.1]}, "different"),
    "mode": ({"mode": "harmonic"}, "geom, all or none, got 'harmonic'"),
    "preset": ({"preset": "p15_d33"}, "no preset is named p15_d33; did you mean p15_d3"),
    "far preset": ({"preset": "zzz"}, "there are p15_d2, p15_d3"),
    "drafts": ({"drafts": 0}, "drafts >= 1"),
    "limit": ({"max_new_tokens": -1}, "max_new_tokens >= 0"),
    "prompt": ({"prompt": 0}, "prompt >= 1"),
    "tree": ({"drafter": PromptCopy()}, "can't share a step.*drop PromptCopy, or use Speculative"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_are_refused_in_one_sentence(name):
    arguments, said = REFUSED[name]
    with pytest.raises(ConfigError, match=said) as error:
        Superposed(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_a_row_and_given_arguments_stand(name):
    made, row = Superposed(preset=name), PRESETS[name]
    assert (made.drafts, made.alpha, made.temperature) == (row.drafts, row.alpha, row.temperature)
    assert made.tokens == (row.tokens or 3 * row.drafts)
    assert (made.lengths, made.weights) == (list(row.lengths), list(row.weights))
    other = Superposed(preset=name, alpha=0.1, tokens=40, drafts=2)
    assert (other.alpha, other.tokens, other.drafts, other.temperature) == (0.1, 40, 2, row.temperature)


def test_the_default_is_the_main_setting_and_more_drafts_keep_three_tokens_each():
    made = Superposed()
    assert (made.drafts, made.tokens, made.alpha, made.temperature) == (3, 9, 0.54, 0.06)
    assert sum(made.weights) == pytest.approx(0.5)
    assert Superposed(drafts=7).tokens == 21


def test_more_drafts_than_tokens_are_refused():
    with pytest.raises(ConfigError, match=r"drafts \(51\) must be <= the vocabulary \(50\)"):
        Superposed(drafts=51, ngrams=None)(language_model(), batch(prompts()))


def test_a_missing_order_names_order_and_file(tmp_path):
    file = saved(tmp_path, lengths=(1, 2))
    with pytest.raises(ConfigError, match=r"ngrams.safetensors has no order 3"):
        Superposed(ngrams=file)(language_model(), batch(prompts()))


def test_another_tokenizers_store_is_refused_with_both_fingerprints(tmp_path):
    model = language_model()
    model.spec = {"vocab_size": VOCAB, "tokenizer": "feedfacecafe"}
    file = str(counted(fingerprint="0123456789ab").save(tmp_path / "n.safetensors"))
    with pytest.raises(ConfigError, match=r"0123456789ab.*feedfacecafe"):
        Superposed(ngrams=file)(model, batch(prompts()))
    with pytest.raises(ConfigError, match=r"60 .*the model has 50"):
        Superposed(ngrams=saved(tmp_path, vocab=60))(language_model(), batch(prompts()))


def test_a_fingerprint_of_digits_that_the_command_line_read_as_a_number_is_no_clash(tmp_path):
    model = language_model()
    model.spec, model.tokenizer = {"vocab_size": VOCAB, "tokenizer": 799368409360}, Named("799368409360")
    file = str(counted(fingerprint="799368409360").save(tmp_path / "n.safetensors"))
    assert Superposed(ngrams=file)(model, batch(prompts())).tokens
    model.tokenizer = Named("feedfacecafe")
    with pytest.raises(ConfigError, match=r"799368409360.*feedfacecafe"):
        Superposed(ngrams=file)(model, batch(prompts()))


def test_a_store_that_is_not_there_or_damaged_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no n-gram store at .*nowhere"):
        Superposed(ngrams=str(tmp_path / "nowhere.safetensors"))(language_model(), batch(prompts()))
    (tmp_path / "bad.safetensors").write_bytes(b"not a store")
    with pytest.raises(DataError, match=r"bad.safetensors"):
        Superposed(ngrams=str(tmp_path / "bad.safetensors"))(language_model(), batch(prompts()))


def test_counting_the_data_needs_data():
    with pytest.raises(ConfigError, match=r"ngrams: data counts .* no data module"):
        Superposed()(language_model(), batch(prompts()))


def test_an_empty_prompt_without_a_start_token_is_refused():
    with pytest.raises(ConfigError, match="prompt 1 is empty and the tokenizer has no start token"):
        Superposed(ngrams=None)(language_model(spec={"bos": None}), batch([[5], []]))


def test_a_prompt_that_fills_the_model_is_refused():
    with pytest.raises(ConfigError, match="prompt 0 has 64 tokens; the model takes 64"):
        Superposed(ngrams=None)(language_model(rope=False), batch(prompts((64,))))


def test_a_model_without_embeddings_is_refused_with_its_own_reason():
    model = language_model()
    for lacks, said in (({}, "CausalLM takes ids only"), ({"embeds": "this model takes ids only"}, "this model")):
        model.decoder._caps = dataclasses.replace(model.decoder._caps, embeds=False, lacks=lacks)
        with pytest.raises(ConfigError, match=f"Superposed needs embeds; {said}"):
            Superposed(ngrams=None)(model, batch(prompts()))


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        Superposed(ngrams=None, stop=["x"])(language_model(), batch(prompts()))


def test_the_metric_refuses_what_it_does_not_measure():
    with pytest.raises(ConfigError, match="DraftSet.report is one of coverage"):
        DraftSet("bleu")
    with pytest.raises(ConfigError, match="next_tokens must be at least 1"):
        DraftSet(next_tokens=0)
