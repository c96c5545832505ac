"""Superposed on real step models: one pass a token, one row a prompt, greedy at its end points."""

import dataclasses

import numpy as np
import pytest
import torch
from superposed_toys import EOS, VOCAB, batch, language_model, loud, prompts, saved, transformer, whole

from quire.contracts import Part, Spec, build
from quire.plugins import load
from quire.roles.language.loop import Greedy
from quire.roles.language.models import Seq2SeqDecoder
from quire.roles.tokens.text import TextEncoder
from quire_superposed.metrics import DraftSet
from quire_superposed.sampler import Superposed
from quire_superposed.shared import likeliest, superposition

LONG = 12


def same(a, b):
    scores = [[s for row in found.scores for s in row] for found in (a, b)]
    return [a.tokens, a.finish] == [b.tokens, b.finish] and np.allclose(*scores, atol=1e-3)


def newest(found):
    return [row[0] for row in found.tokens]


@pytest.mark.parametrize("off", [{"mode": "none"}, {"alpha": 0.0}, {"ngrams": None}])
@pytest.mark.parametrize("model", [language_model(), language_model(seed=3, rope=False), transformer("llama")])
def test_oracle_1_one_draft_without_n_grams_is_greedy(off, model, tmp_path):
    arguments = {"ngrams": saved(tmp_path), **off}
    rows = [*prompts(), *prompts((4, 9, 2, 6, 30), seed=5)]
    want = Greedy(LONG)(model, batch(rows))
    found = Superposed(drafts=1, max_new_tokens=LONG, **arguments)(model, batch(rows))
    assert newest(found) == newest(want) and found.finish == want.finish
    assert found.stats.target_forwards == want.stats.target_forwards


def test_oracle_1_one_draft_that_ends_is_greedy_to_its_end_token():
    model = language_model(seed=2)
    rows = prompts([5] * 40, seed=9)
    want = Greedy(30)(model, batch(rows))
    assert sum(f == ["eos"] for f in want.finish) >= 3
    found = Superposed(drafts=1, mode="none", temperature=0.8, max_new_tokens=30)(model, batch(rows))
    assert newest(found) == newest(want) and found.finish == want.finish


def test_oracle_1_with_n_grams_one_draft_may_leave_greedy(tmp_path):
    model, rows = language_model(), prompts()
    ngrams = saved(tmp_path, alphabet=range(4, 20))
    found = Superposed(drafts=1, alpha=0.9, temperature=1.0, ngrams=ngrams)(model, batch(rows))
    assert newest(found) != newest(Greedy(10)(model, batch(rows)))


def test_oracle_2_the_mixed_embedding_is_in_the_hull_and_equal_tokens_give_their_own():
    model = language_model().decoder
    last = torch.tensor([[7, 7, 7], [4, 9, 30]])
    embeds = model.embed(last)
    x = superposition(embeds, np.array([[0.2, 0.5, 0.3], [0.1, 0.6, 0.3]]))
    assert x.shape == (2, 1, 32)
    assert torch.allclose(x[0, 0], embeds[0, 0], atol=1e-6)
    assert torch.allclose(x[1, 0], 0.1 * embeds[1, 0] + 0.6 * embeds[1, 1] + 0.3 * embeds[1, 2], atol=1e-6)
    assert (x[1, 0] <= embeds[1].max(0).values + 1e-6).all() and (x[1, 0] >= embeds[1].min(0).values - 1e-6).all()


@pytest.mark.parametrize("drafts", [1, 3, 10])
def test_oracle_3_one_pass_a_token_and_one_cache_row_a_prompt(drafts, tmp_path):
    model = language_model(spec={"eos": None})
    seen = []
    step = model.decoder.step

    def watched(state, ids, embeds=None, **how):
        seen.append((embeds.shape[0], embeds.shape[1], len(state.cache[0].keys)))
        return step(state, ids, embeds=embeds, **how)

    object.__setattr__(model.decoder, "step", watched)
    found = Superposed(drafts=drafts, ngrams=saved(tmp_path))(model, batch(prompts()))
    assert found.stats.target_forwards == 9 == len(seen)
    assert found.stats.target_positions == 9 * 5
    assert set(seen) == {(5, 1, 5)}
    assert all(len(row) == drafts and all(len(d) == 10 for d in row) for row in found.tokens)
    assert all(len({tuple(d) for d in row}) == drafts for row in found.tokens)
    assert all(s == sorted(s, reverse=True) for s in found.scores)


@pytest.mark.parametrize("mode", ["geom", "all", "none"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_oracle_8_a_batch_of_ragged_prompts_is_each_alone(mode, side, tmp_path):
    model, rows = language_model(), prompts()
    sampler = Superposed(mode=mode, temperature=0.3, ngrams=saved(tmp_path, size=20000))
    together = sampler(model, batch(rows, side))
    for i, row in enumerate(rows):
        alone = sampler(model, batch([row]))
        assert together.tokens[i] == alone.tokens[0] and together.finish[i] == alone.finish[0]
        assert together.scores[i] == pytest.approx(alone.scores[0], abs=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_oracle_9_greedy_through_embeds_is_greedy(name):
    model = transformer(name)
    target, rows = model.decoder, prompts()
    want = newest(Greedy(LONG)(model, batch(rows)))
    with torch.no_grad():
        for row, ids in zip(rows, want):
            state = target.open(torch.tensor([row]))
            logits, got = state.logits, []
            while len(got) < len(ids):
                got.append(int(logits.argmax()))
                logits = target.step(state, None, embeds=target.embed(torch.tensor([[got[-1]]])))[:, 0]
                target.keep(state, torch.zeros(1, 1, dtype=torch.long))
            assert got == ids


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_oracle_10_stopping_early_gives_the_same_drafts_in_fewer_passes(seed):
    model, rows = language_model(seed=seed), prompts([6] * 12, seed=seed)
    model.decoder._caps = dataclasses.replace(model.decoder._caps, eos_ids=tuple(range(4, 14)))
    arguments = {"drafts": 2, "temperature": 2.0, "mode": "none", "max_new_tokens": 40}
    early = Superposed(**arguments)(model, batch(rows))
    late = Superposed(stop_early=False, **arguments)(model, batch(rows))
    assert same(early, late)
    assert early.stats.target_positions < late.stats.target_positions


def test_limits_are_exact_and_zero_runs_no_pass(tmp_path):
    model = language_model(rope=False)
    none = Superposed(max_new_tokens=0, ngrams=saved(tmp_path))(model, batch(prompts()))
    assert none.tokens == [[[]]] * 5 and none.stats.target_forwards == 0
    near = Superposed(ngrams=saved(tmp_path))(model, batch(prompts((58, 4), seed=2)))
    assert max(map(len, near.tokens[0])) == 6 and max(map(len, near.tokens[1])) == 10


class Ban(Part):
    """Forbids what the prefix already holds."""

    def forward(self, prefix, logits):
        logits = logits.clone()
        logits[prefix] = -torch.inf
        return logits


def test_processors_act_on_each_draft_with_its_own_prefix(tmp_path):
    model, rows = language_model(spec={"eos": None}), prompts((3, 8))
    free = Superposed(ngrams=saved(tmp_path), temperature=1.0)(model, batch(rows))
    bound = Superposed(ngrams=saved(tmp_path), temperature=1.0, processors=[Ban()])(model, batch(rows))
    assert any(len(set(p + d)) < len(p) + len(d) for p, several in zip(rows, free.tokens) for d in several)
    for prompt, several in zip(rows, bound.tokens):
        for draft in several:
            assert len(set(draft)) == len(draft) and not set(prompt) & set(draft)


class BanAll(Part):
    """Forbids everything once three tokens are out."""

    def forward(self, prefix, logits):
        return logits if len(prefix) < 8 else torch.full_like(logits, -torch.inf)


@pytest.mark.parametrize("mode", ["geom", "none"])
def test_drafts_that_may_not_go_on_leave_no_draft(mode, tmp_path):
    model = language_model(spec={"eos": None})
    found = Superposed(ngrams=saved(tmp_path), mode=mode, processors=[BanAll()])(model, batch(prompts((5, 2))))
    assert found.tokens == [[], []] and found.scores == [[], []]


def test_stop_strings_end_single_drafts(tmp_path):
    model = language_model(spec={"eos": None})
    model.tokenizer = type("Letters", (), {"decode": staticmethod(lambda ids: "".join(chr(60 + i) for i in ids))})()
    plain = Superposed(ngrams=None, temperature=1.0)(model, batch(prompts((3,))))
    letter = chr(60 + plain.tokens[0][0][4])
    found = Superposed(ngrams=None, temperature=1.0, stop=[letter])(model, batch(prompts((3,))))
    assert "stop" in found.finish[0]
    for draft, reason in zip(found.tokens[0], found.finish[0]):
        text = model.tokenizer.decode(draft)
        assert (letter in text) == (reason == "stop") and letter not in text[:-1]


def test_the_prompt_argument_cuts_rows(tmp_path):
    model, rows = language_model(), prompts((12, 20))
    ngrams = saved(tmp_path)
    a = Superposed(ngrams=ngrams, prompt=5)(model, batch(rows))
    assert same(a, Superposed(ngrams=ngrams)(model, batch([r[:5] for r in rows])))


def test_ties_at_the_border_of_the_kept_tokens_go_to_the_lower_ids():
    ids, log_p = likeliest(torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0, 3.0]]), 4)
    assert ids.tolist() == [[1, 2, 3, 5]]
    assert np.exp(log_p).sum() == pytest.approx(1)
    every, log_p = likeliest(torch.randn(2, 1, 5), None)
    assert every.shape == log_p.shape == (2, 1, 5)


# ---- other models
def test_a_model_without_batches_runs_row_by_row_and_says_so(tmp_path):
    model, rows, ngrams = language_model(), prompts(), saved(tmp_path)
    together = Superposed(ngrams=ngrams)(model, batch(rows))
    model.decoder._caps = dataclasses.replace(model.decoder._caps, batch=False)
    looped = Superposed(ngrams=ngrams)(model, batch(rows))
    assert same(together, looped) and looped.stats.rows_looped == 5 and together.stats.rows_looped == 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_drafts_on_transformers_models(name, tmp_path):
    found = Superposed(ngrams=saved(tmp_path))(transformer(name), batch(prompts()))
    assert all(len(row) == 3 for row in found.tokens) and found.stats.target_forwards <= 9


def sequence_to_sequence():
    torch.manual_seed(0)
    encoder, decoder = TextEncoder(width=32, depth=1, heads=2), Seq2SeqDecoder(width=32, depth=2, heads=4)
    spec = Spec({"vocab_size": VOCAB, "length": 64, "eos": EOS, "bos": 1})
    build(encoder, spec)
    build(decoder, Spec({**spec, "codes": encoder.sizes()}))
    loud(encoder)

    def read(given):
        return encoder({"tokens": given["source"], "mask": given["source_mask"]})

    return whole(loud(decoder), read)


@pytest.mark.parametrize("ours", [True, False])
def test_it_drafts_behind_a_source(ours, tmp_path):
    model = sequence_to_sequence() if ours else transformer("bart")
    rows = prompts((4, 6, 9), seed=4)
    given = {("source" if k == "tokens" else "source_mask"): v for k, v in batch(rows).items()}
    sampler = Superposed(ngrams=saved(tmp_path), temperature=0.5)
    found = sampler(model, given)
    assert [len(row) for row in found.tokens] == [3, 3, 3]
    for i, row in enumerate(rows):
        alone = {("source" if k == "tokens" else "source_mask"): v for k, v in batch([row]).items()}
        assert found.tokens[i] == sampler(model, alone).tokens[0]
    greedy = Superposed(drafts=1, mode="none")(model, given)
    assert newest(greedy) == newest(Greedy(10)(model, given))
    target = {**given, "tokens": torch.tensor([[2 - ours, *d[0][:4]] for d in found.tokens])}
    metric = DraftSet()
    model.sampler = sampler
    metric.sampled(model, target, found)
    assert metric.table()["coverage"] == 1 and metric.table()["perplexity_best"] > 1


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("UniversalDecoder", {"width": 16, "heads": 2, "ffn": 32, "steps": 3, "dropout": 0.0}),
        ("RoutedModel", None),
    ],
)
def test_it_drafts_on_other_plugins_models(name, arguments, tmp_path):
    if name not in load().registry.entries:
        pytest.skip(f"no installed plugin has {name}")
    cls = load().registry.get(name).load()
    torch.manual_seed(0)
    if arguments is None:
        from quire.roles.language.models import CausalLM

        decoder = cls(CausalLM(width=32, depth=4, heads=4))
    else:
        decoder = cls(**arguments)
    build(decoder, Spec({"vocab_size": VOCAB, "length": 64, "eos": EOS, "bos": 1}))
    model, rows, ngrams = whole(loud(decoder)), prompts(), saved(tmp_path)
    found = Superposed(ngrams=ngrams, temperature=0.5)(model, batch(rows))
    for i, row in enumerate(rows):
        assert found.tokens[i] == Superposed(ngrams=ngrams, temperature=0.5)(model, batch([row])).tokens[0]
    one = Superposed(drafts=1, mode="none")(model, batch(rows))
    assert newest(one) == newest(Greedy(10)(model, batch(rows)))
