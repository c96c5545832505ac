from __future__ import annotations

import itertools

import pytest
import torch
from tests.language import hf_toys, toys
from tests.language.toys import EOS, SHAPES, VOCAB, batch, language_model, prompts

from quire import ConfigError
from quire.contracts import Part
from quire.roles.language.accept import SampleOnce
from quire.roles.language.beam import BeamSearch, best
from quire.roles.language.drafters import PromptCopy
from quire.roles.language.loop import Greedy


def log_probability(model, prompt, new):
    """Sum of the log-probabilities of a continuation, by one whole pass."""
    with torch.no_grad():
        law = torch.log_softmax(model.decoder(None, torch.tensor([prompt + new]))[0], -1)
    return float(sum(law[len(prompt) - 1 + i, token] for i, token in enumerate(new)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_one_beam_is_greedy(shape, side):
    model, rows = language_model(shape), prompts()
    plain, one = Greedy(20)(model, batch(rows, side)), BeamSearch(1, max_new_tokens=20)(model, batch(rows, side))
    assert one.tokens == plain.tokens
    assert one.finish == plain.finish
    assert one.stats.target_forwards == plain.stats.target_forwards


@pytest.mark.parametrize("name", ["gpt2", "llama", "bart", "t5"])
@pytest.mark.parametrize(("beams", "penalty", "least"), [(3, 0.0, 6), (4, 0.6, 0), (2, -0.5, 3)])
def test_beams_and_scores_equal_those_of_transformers(name, beams, penalty, least):
    rows = hf_toys.prompts((3, 7, 1))
    endless = BeamSearch(3, max_new_tokens=8)(hf_toys.toy(name, eos=None), hf_toys.batch(name, rows))
    end = endless.tokens[1][0][5]  # a token that beams do reach ends them
    model = hf_toys.toy(name, eos=end)
    sampler = BeamSearch(beams, least, penalty, max_new_tokens=12)
    ours = sampler(model, hf_toys.batch(name, rows))
    ended = 0
    for row, tokens, scores in zip(rows, ours.tokens, ours.scores):
        ids = torch.tensor([row])
        theirs = model.decoder.module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            min_new_tokens=least,
            do_sample=False,
            num_beams=beams,
            num_return_sequences=beams,
            length_penalty=penalty,
            early_stopping="never",  # the exact bound; their default is a heuristic where lengths are weighed
            return_dict_in_generate=True,
            output_scores=True,
        )
        start = 1 if name in hf_toys.SEQ2SEQ else len(row)
        want = [s[start:].tolist() for s in theirs.sequences]
        cut = [w[: w.index(end) + 1] if end in w else w for w in want]
        assert tokens == cut
        assert scores == pytest.approx(theirs.sequences_scores.tolist(), abs=1e-4)
        ended += sum(end in w for w in want)
    assert ended > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_ragged_batch_equals_each_prompt_alone(shape):
    model, rows = language_model(shape), prompts()
    sampler = BeamSearch(3, max_new_tokens=12)
    alone = [sampler(model, batch([p])) for p in rows]
    for side in ("left", "right"):
        together = sampler(model, batch(rows, side))
        assert together.tokens == [a.tokens[0] for a in alone]
        for got, want in zip(together.scores, alone):
            assert got == pytest.approx(want.scores[0], abs=1e-4)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_scores_are_ranked_sums_of_log_probabilities_over_length_to_the_penalty(penalty):
    model, rows = language_model(), prompts()
    result = BeamSearch(4, length_penalty=penalty, max_new_tokens=10)(model, batch(rows))
    for prompt, tokens, scores, finish in zip(rows, result.tokens, result.scores, result.finish):
        assert len(tokens) == len(scores) == len(finish) == 4
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(t) for t in tokens}) == 4
        for new, score, end in zip(tokens, scores, finish):
            assert score == pytest.approx(log_probability(model, prompt, new) / len(new) ** penalty, abs=1e-4)
            assert (new[-1] == EOS) == (end == "eos")
            assert EOS not in new[:-1]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_enough_beams_find_the_best_of_all_continuations(penalty):
    model = language_model(vocab_size=6, width=16)
    for seed in range(5):
        prompt = [4, 5, 4, 5][seed % 3 :]
        every = [list(c) for n in (1, 2, 3) for c in itertools.product(range(6), repeat=n)]
        whole = [c for c in every if EOS not in c[:-1] and (c[-1] == EOS or len(c) == 3)]
        ranked = sorted(whole, key=lambda c: -log_probability(model, prompt, c) / len(c) ** penalty)
        found = BeamSearch(36, length_penalty=penalty, max_new_tokens=3)(model, batch([prompt]))
        assert found.tokens[0][:5] == ranked[:5]


def test_no_end_before_the_least_length_and_none_after_the_limit():
    model = language_model()
    rows = prompts(tuple(range(1, 12)))
    result = BeamSearch(3, min_new_tokens=5, max_new_tokens=8)(model, batch(rows))
    lengths = [len(t) for row in result.tokens for t in row]
    assert min(lengths) >= 5
    assert max(lengths) == 8
    none = BeamSearch(3, max_new_tokens=0)(model, batch(rows[:2]))
    assert (none.tokens, none.finish) == ([[[]], [[]]], [["length"]] * 2)
    assert none.stats.target_forwards == 0


def test_the_search_stops_when_no_beam_can_overtake():
    class Ends(Part):
        def forward(self, prefix, logits):
            law = torch.full((VOCAB,), -20.0)
            law[EOS], law[7] = -0.1, -3.0
            return law

    result = BeamSearch(2, max_new_tokens=50, processors=[Ends()])(language_model(), batch(prompts((4,))))
    assert result.tokens[0] == [[EOS], [7, EOS]]
    assert result.scores[0] == pytest.approx([-0.1, -3.1])
    assert result.stats.target_forwards == 1  # [7, 7] has -6: below both that have ended


def test_a_stop_string_ends_a_beam():
    model = language_model(eos=None)
    model.tokenizer = type("Letters", (), {"decode": staticmethod(lambda ids: "".join(chr(65 + i) for i in ids))})
    free = BeamSearch(3, max_new_tokens=6)(model, batch(prompts((4,)))).tokens[0]
    letter = chr(65 + free[0][1])
    stopped = BeamSearch(3, max_new_tokens=6, stop=[letter])(model, batch(prompts((4,))))
    assert "stop" in stopped.finish[0]
    for tokens, end in zip(stopped.tokens[0], stopped.finish[0]):
        assert (chr(65 + tokens[-1]) == letter) == (end == "stop")


def test_equal_numbers_rank_by_place_and_impossible_ones_not_at_all():
    assert best(torch.tensor([1.0, 3.0, 1.0, 1.0, -torch.inf]), 3) == [(1, 3.0), (0, 1.0), (2, 1.0)]
    assert best(torch.tensor([-torch.inf, 0.0]), 2) == [(1, 0.0)]


def test_statistics_count_passes_and_all_returned_tokens():
    model, rows = language_model(eos=None), prompts()
    stats = BeamSearch(3, max_new_tokens=9)(model, batch(rows)).stats
    assert (stats.target_forwards, stats.target_positions) == (8, 8 * 3 * 5)
    assert (stats.rows, stats.new_tokens) == (15, 15 * 9)
    assert stats.cache_bytes_peak > 0


def test_a_model_that_takes_no_ragged_batch_is_searched_row_by_row():
    window = hf_toys.SimpleNamespace(decoder=hf_toys.adapter("mistral", cache="sliding"), encoder=None)
    full, rows = hf_toys.toy("mistral"), hf_toys.prompts((3, 7))
    a, b = (BeamSearch(3, max_new_tokens=12)(m, hf_toys.batch("mistral", rows)) for m in (window, full))
    assert a.tokens == b.tokens
    assert (a.stats.rows_looped, b.stats.rows_looped) == (2, 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"drafter": PromptCopy()},
            "decoding is defined for greedy or sampling, not beams: drop PromptCopy",
        ),
        ({"acceptance": SampleOnce()}, "not beams: drop SampleOnce"),
        ({"beams": 0}, "beams must be at least 1, got 0"),
        ({"max_new_tokens": -1}, "0 <= min_new_tokens <= max_new_tokens"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "got min_new_tokens 9, max_new_tokens 8"),
    ],
)
def test_what_beams_can_not_do_is_named(arguments, said):
    with pytest.raises(ConfigError, match=said):
        BeamSearch(**arguments)


def test_prompts_too_long_or_empty_are_named():
    with pytest.raises(ConfigError, match="prompt 0 has 64 tokens; the model takes 64"):
        BeamSearch()(language_model("learned"), batch(prompts((64,))))
    with pytest.raises(ConfigError, match="sampler.stop needs a tokenizer"):
        BeamSearch(stop=["x"])(language_model(), toys.batch(prompts((3,))))
    limited = BeamSearch(2)(language_model("learned", eos=None), batch(prompts((60, 61))))
    assert [[len(t) for t in row] for row in limited.tokens] == [[4, 4], [3, 3]]
