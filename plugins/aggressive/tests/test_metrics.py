"""EditScores: edits, F0.5 and BLEU on known rows; what drafting saved and changed."""

import math
from types import SimpleNamespace

import pytest
import torch
from aggressive_toys import batch, rows, toy

from quire.roles.language.drafters import PromptCopy
from quire.roles.language.loop import Speculative
from quire_aggressive.accept import Tolerance
from quire_aggressive.edits import bleu, bleu_counts, edit_counts, edits, f_score
from quire_aggressive.metrics import EditScores
from quire_aggressive.source import SourceCopy


def test_edits_are_the_stretches_that_differ():
    source, target = ["he", "go", "to", "an", "school"], ["he", "goes", "to", "school", "now"]
    assert edits(source, target) == {(1, 2, ("goes",)), (3, 4, ()), (5, 5, ("now",))}
    assert edits(source, source) == frozenset()


def test_f_of_one_half_weighs_precision_twice():
    assert f_score(1, 2, 1) == pytest.approx(1.25 * 0.5 / (0.25 * 0.5 + 1.0))  # P .5, R 1
    assert f_score(1, 1, 2) > f_score(1, 2, 1)
    assert f_score(0, 0, 0) == 1 and f_score(0, 0, 3) == 0 and f_score(0, 3, 0) == 0


def test_a_row_counts_against_its_best_reference():
    source = ["a", "b", "c", "d"]
    assert edit_counts(source, ["a", "x", "c", "d"], [["a", "y", "c", "d"], ["a", "x", "c", "e"]]) == (1, 1, 2)
    assert edit_counts(source, source, [["a", "y", "c", "d"], source]) == (0, 0, 0)


def test_bleu_is_1_for_a_copy_and_matches_by_hand():
    words = ["the", "cat", "sat", "on", "the", "mat"]
    assert bleu(bleu_counts(words, [words])) == 1
    counts = bleu_counts(["the", "cat", "sat", "on", "a", "mat"], [words])
    assert counts == [6, 6, 5, 6, 3, 5, 2, 4, 1, 3]
    assert bleu(counts) == pytest.approx(math.exp(sum(map(math.log, (5 / 6, 3 / 5, 2 / 4, 1 / 3))) / 4))
    assert bleu(bleu_counts(words[:5], [words])) == pytest.approx(math.exp(1 - 6 / 5))
    assert bleu(bleu_counts(["dog"], [words])) == 0


def test_bleu_agrees_with_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    outputs = ["the cat sat on a mat today", "he went to school by the bus"]
    references = ["the cat sat on the mat today", "he goes to school by bus"]
    total = [sum(c) for c in zip(*(bleu_counts(o.split(), [r.split()]) for o, r in zip(outputs, references)))]
    theirs = sacrebleu.corpus_bleu(outputs, [references], tokenize="none", smooth_method="none").score
    assert 100 * bleu(total) == pytest.approx(theirs, abs=1e-6)


def scored(name, sampler, greedy=True):
    model, given = toy(name), batch(name, rows())
    given["tokens"] = torch.tensor([[1, 5, 6, 3]] * 5) if "source" in given else given["tokens"]
    whole = SimpleNamespace(decoder=model.decoder, encoder=model.encoder, sampler=sampler, tokenizer=None)
    result = sampler(whole, given)
    metric = EditScores(greedy)
    metric.sampled(whole, given, result)
    assert float(metric.compute()) == pytest.approx(metric.scores()["f05"])
    return metric.scores(), result.stats


def test_a_lossless_run_changes_nothing_and_its_savings_are_the_statistics():
    scores, stats = scored("own seq2seq", Speculative(SourceCopy(), max_new_tokens=12))
    assert scores["changed"] == 0 and scores["iterations"] == stats.steps / 5
    assert scores["accepted"] == pytest.approx(stats.accepted / stats.steps)
    assert scores["tokens_per_pass"] == pytest.approx(stats.new_tokens / stats.passes)


def test_a_tolerant_runs_changed_outputs_are_counted():
    scores, _ = scored("gpt2", Speculative(PromptCopy(1), Tolerance(50, 1e9), max_new_tokens=12))
    assert 0 < scores["changed"] <= 1
    assert "changed" not in scored("gpt2", Speculative(PromptCopy(1), max_new_tokens=4), greedy=False)[0]


def test_pairs_in_one_row_are_told_apart_by_prompt_length():
    model = SimpleNamespace(decoder=toy("gpt2").decoder, tokenizer=None)
    from quire_aggressive.metrics import pairs_of

    given = {"tokens": torch.tensor([[5, 6, 1, 7, 8, 3]]), "prompt_length": torch.tensor([3])}
    given["source_span"] = torch.tensor([[0, 2]])
    assert pairs_of(model, given, [0]) == [([5, 6], [[7, 8]])]


def test_before_any_prediction_it_is_0():
    assert EditScores().compute() == 0
