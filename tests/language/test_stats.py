from __future__ import annotations

import functools

import pytest
from tests.language.toys import Gambler, batch, language_model, prompts

from quire.roles.language.contract import Draft, Drafter
from quire.roles.language.drafters import DraftUnion, PromptCopy, SelfDraft, SmallModel
from quire.roles.language.loop import Greedy, Speculative
from quire.roles.language.metrics import AcceptanceStats
from quire.roles.language.stats import Stats

SPEC = (
    *("prefill_ms", "decode_ms", "draft_ms", "verify_ms", "ttft_ms", "tpot_ms", "target_forwards", "target_positions"),
    *("drafter_forwards", "drafted", "accepted", "accepted_hist", "per_depth_accept", "fallback_steps"),
    *("guard_off_steps", "layers_used_mean", "cache_bytes_peak", "new_tokens", "rows_looped"),
)


def drafted(rows=None, count=16):
    model, rows = language_model(eos=None), rows or prompts()
    truth = [r[0] for r in Greedy(count)(model, batch(rows)).tokens]
    return Speculative(Gambler(rows, truth), max_new_tokens=count)(model, batch(rows))


def test_the_record_is_the_specs_and_goes_through_json():
    stats = drafted().stats
    assert set(SPEC) <= set(stats.to_dict())
    assert Stats.from_json(stats.to_json()) == stats
    assert vars(Stats.from_json(stats.to_json())) == vars(stats)  # times too
    for name in ("prefill_ms", "decode_ms", "draft_ms", "verify_ms", "ttft_ms", "tpot_ms", "cache_bytes_peak"):
        assert stats.to_dict()[name] > 0
    assert stats.draft_ms + stats.verify_ms <= stats.prefill_ms + stats.decode_ms
    lines = stats.table().splitlines()
    assert {line.split()[0] for line in lines} == {k for k, v in stats.to_dict().items() if v}


def test_counts_of_rows_sum_to_those_of_the_batch():
    result = drafted()
    whole = functools.reduce(Stats.merge, result.row_stats)
    for name in ("rows", "steps", "new_tokens", "cut", "drafted", "accepted", "accepted_hist", "depth_drafted"):
        assert getattr(whole, name) == getattr(result.stats, name)
    for row, tokens in zip(result.row_stats, result.tokens):
        assert row.new_tokens == len(tokens[0]) == row.accepted + row.steps + 1 - row.opened - row.cut
    assert result.stats.accepted == sum(n * times for n, times in result.stats.accepted_hist.items())


def test_what_a_step_accepts_is_the_sum_over_depths():
    stats = drafted().stats
    by_depth = stats.per_step_accept()
    assert sum(by_depth.values()) == pytest.approx(stats.accepted / stats.steps)
    assert list(by_depth.values()) == sorted(by_depth.values(), reverse=True)


def test_the_metric_knows_each_prompt_of_a_batch_by_its_number():
    class Learns(Drafter):
        """Nothing for the first three prompts, then the truth."""

        def propose(self, row, context, budget):
            at = len(context) - len(rows[row])
            return Draft.chain(truth[row][at : at + 3]) if row > 2 and at < len(truth[row]) else None

    model, rows = language_model(eos=None), prompts()
    truth = [r[0] for r in Greedy(12)(model, batch(rows)).tokens]
    metric = AcceptanceStats()
    result = Speculative(Learns(), max_new_tokens=12)(model, batch(rows))
    result.index = [7, 8, 9, 10, 11]
    metric.sampled(model, {}, result)
    assert list(metric.curve()) == result.index
    assert [metric.curve()[n] > 0 for n in result.index] == [False, False, False, True, True]
    assert sum(metric.steps_by_depth().values()) == pytest.approx(float(metric.compute()))
    assert result.stats.fallback_steps == sum(s.fallback_steps for s in result.row_stats) >= 33
    metric.reset()
    assert (metric.curve(), float(metric.compute())) == ({}, 0.0)


@pytest.mark.parametrize(
    "make", [lambda m: SmallModel(m, 2), lambda m: DraftUnion([PromptCopy(), SelfDraft(tokens=2)])]
)
def test_passes_of_drafters_are_counted_once_also_row_by_row_and_again(make, monkeypatch):
    model, rows = language_model(eos=None), prompts()
    sampler = Speculative(make(model.decoder), max_new_tokens=9)
    alone = sum(sampler(model, batch([r])).stats.drafter_forwards for r in rows)
    caps = model.decoder.caps()
    looped = type(caps)(**{**vars(caps), "batch": False})
    monkeypatch.setattr(model.decoder, "_caps", looped)
    for _ in range(2):
        stats = sampler(model, batch(rows)).stats
        assert (stats.drafter_forwards, stats.rows_looped) == (alone, 5)
