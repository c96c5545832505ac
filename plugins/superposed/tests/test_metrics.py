"""What DraftSet counts, by hand; the base model's perplexity by its own pass."""

import math

import pytest
import torch
from superposed_toys import batch, language_model, prompts, saved
from torch import nn
from torch.nn.functional import cross_entropy

from quire_superposed.diversity import bleu, distinct, self_bleu
from quire_superposed.metrics import DraftSet, nats
from quire_superposed.sampler import Superposed


def test_coverage_is_the_best_drafts_share_of_true_tokens_before_its_first_error():
    metric = DraftSet(next_tokens=3)
    metric.update([[[1, 2, 9], [1, 8, 3]], [[4, 5], [6, 7]]], [[1, 2, 3, 4], [4, 5]], [[1.0, 2.0], [0.5, 0.5]])
    assert float(metric.compute()) == pytest.approx((2 / 3 + 1) / 2)
    found = metric.table()
    assert found["exact"] == 0.5
    assert found["perplexity_best"] == pytest.approx(math.exp(0.75))
    assert found["perplexity_mean"] == pytest.approx(math.exp(1.0))


def test_prompts_without_a_truth_or_drafts_count_where_they_can():
    metric = DraftSet("distinct_1")
    assert float(metric.compute()) == 0
    metric.update([[[1, 1], [1, 2]], []], [[], [3]], [[0.0, 0.0], []])
    assert float(metric.compute()) == pytest.approx(2 / 4)
    assert metric.table()["coverage"] == 0


def test_distinct_counts_different_n_grams_of_all_drafts_together():
    drafts = [[1, 2, 3], [1, 2, 4]]
    assert distinct(drafts, 1) == 4 / 6
    assert distinct(drafts, 2) == 3 / 4
    assert distinct(drafts, 4) == 0


def test_bleu_by_hand():
    assert bleu([1, 2, 3, 4, 5], [[1, 2, 3, 4, 5]]) == pytest.approx(1)
    # precisions 3/4, 1/3, none of 2, none of 1 (smoothed to 0.1), no brevity penalty
    want = (3 / 4 * 1 / 3 * 0.1 / 2 * 0.1 / 1) ** 0.25
    assert bleu([1, 2, 9, 4], [[1, 2, 3, 4]]) == pytest.approx(want)
    assert bleu([1, 2], [[1, 2, 3, 4]]) == pytest.approx(math.exp(1 - 4 / 2))
    assert bleu([1, 1, 1], [[1, 2, 3]]) == pytest.approx((1 / 3 * 0.1 / 2 * 0.1 / 1) ** (1 / 3))


def test_self_bleu_is_one_for_equal_drafts_and_zero_for_one():
    assert self_bleu([[1, 2, 3, 4]] * 3) == pytest.approx(1)
    assert self_bleu([[1, 2, 3, 4]]) == 0
    assert self_bleu([[1, 2, 3, 4], [1, 2, 3, 9]]) > self_bleu([[1, 2, 3, 4], [5, 6, 7, 8]])


def test_nats_are_the_models_own_over_the_continuation():
    model, rows = language_model(), prompts((3, 6))
    drafts = [[[7, 8, 9], [10]], [[11, 12]]]
    found = nats(model, batch(rows), rows, drafts)
    for row, several, losses in zip(rows, drafts, found):
        for draft, loss in zip(several, losses):
            ids = torch.tensor([row + draft])
            logits = model.decoder(None, ids[:, :-1])[0, len(row) - 1 :].detach()
            assert loss == pytest.approx(float(cross_entropy(logits, torch.tensor(draft))), abs=1e-5)


def test_it_reads_the_samplers_results_and_the_rest_of_each_row(tmp_path):
    model, metric = language_model(), DraftSet()
    model.sampler = Superposed(ngrams=saved(tmp_path), prompt=4)
    model.metrics = nn.ModuleList([metric])
    given = batch(prompts((12, 20)))
    results = model.sampler(model, given)
    given["tokens"][0, 4:14] = torch.tensor([*results.tokens[0][0], *[9] * (10 - len(results.tokens[0][0]))])[:10]
    given["mask"][0, :14] = True
    metric.sampled(model, given, results)
    assert metric.table()["coverage"] >= 0.5
    written = model.sampler.finish(model, [results])
    assert written[-1]["drafts"]["perplexity_best"] <= written[-1]["drafts"]["perplexity_mean"]
    assert len(written) == 3 and len(written[0]["tokens"]) == len(written[0]["scores"]) == 3
    metric.sampled(model, given, {"not": "text"})
