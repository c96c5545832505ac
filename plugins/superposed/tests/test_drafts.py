"""The drafts' arithmetic: mixed scores, selection, weights of the mixture, ends and early stops."""

import numpy as np
import pytest

from quire_superposed.drafts import Drafts, best, mixed

NONE = frozenset()


def drafts(count=3, rows=1, limit=10, reach=2):
    return Drafts(np.full((rows, reach), -1), count, np.full(rows, limit))


def gains(source, rows=1, count=3, choices=6):
    return np.log(source.dirichlet(np.full(choices, 0.3), (rows, count)) + 1e-12)


def test_oracle_6_the_n_grams_win():
    q = np.array([0.2, 0.8])
    found = mixed(np.log([0.6, 0.4]), q, 0.5, 200.0)
    assert found == pytest.approx([-1.0601, -0.5697], abs=5e-5)


def test_oracle_7_without_evidence_the_penalty_is_taken_and_drafts_with_evidence_come_first():
    log_p = np.log([[0.6, 0.4], [0.6, 0.4]])
    found = mixed(log_p, np.array([[0.0, 0.0], [0.0, 1e-6]]), 0.54, 200.0)
    assert found[0] == pytest.approx(0.46 * log_p[0] - 200)
    assert found[1, 0] == -np.inf and found[1, 1] > found[0].max()


def test_one_zero_excludes_a_token_unless_there_is_a_floor():
    log_p, q = np.log([0.99, 0.01]), np.array([0.0, 0.1])
    assert mixed(log_p, q, 0.5, 200.0)[0] == -np.inf
    assert mixed(log_p, q, 0.5, 200.0, floor=0.01)[0] > mixed(log_p, q, 0.5, 200.0, floor=0.01)[1]


def test_alpha_at_its_ends_and_impossible_tokens_give_no_nan():
    log_p = np.array([np.log(0.7), np.log(0.3), -np.inf])
    q = np.array([0.0, 0.5, 0.5])
    assert mixed(log_p, q, 0.0, 200.0) is log_p
    assert mixed(log_p, None, 0.5, 200.0) is log_p
    assert mixed(log_p, q, 1.0, 200.0).tolist() == [-np.inf, np.log(0.5), -np.inf]
    assert mixed(log_p, np.zeros(3), 1.0, 200.0).tolist() == [-200, -200, -np.inf]
    assert mixed(log_p, np.array([0, 0, 0.5]), 0.5, 200.0)[:2] == pytest.approx(0.5 * log_p[:2] - 200)


def test_oracle_4_the_first_drafts_are_the_top_of_the_first_mixed_distribution():
    held = drafts()
    first = np.log([[0.1, 0.4, 0.05, 0.2, 0.2, 0.05]])
    held.advance(np.arange(6)[None, None] + 10, np.repeat(first[:, None], 3, 1), NONE)
    assert held.ids[0, :, 0].tolist() == [11, 13, 14]  # of equals the lower id
    assert held.scores[0] == pytest.approx(np.log([0.4, 0.2, 0.2]))


def test_oracle_4_scores_never_rise_and_drafts_stay_pairwise_distinct():
    source, held = np.random.default_rng(0), drafts(count=4, rows=5, limit=30)
    top = np.zeros(5)
    for _ in range(12):
        held.advance(np.arange(6)[None, None], gains(source, 5, 4), NONE)
        assert (held.scores.max(1) <= top + 1e-12).all()
        top = held.scores.max(1)
        for p in range(5):
            assert len({tuple(ids) for ids in held.ids[p].tolist()}) == 4
            assert (held.tails[p] == held.ids[p, :, -2:]).all() or held.length < 2


def test_oracle_2_the_weights_are_a_distribution_over_living_drafts():
    held = drafts(rows=2)
    held.scores = np.array([[-1.0, -2.0, -np.inf], [-500.0, -501.0, -700.0]])
    u = held.weights()
    assert (u >= 0).all() and u.sum(1) == pytest.approx([1, 1], abs=1e-12)
    assert u[0, 2] == 0 and u[0, 0] / u[0, 1] == pytest.approx(np.e)


def test_oracle_8_permuting_drafts_leaves_the_result_set_unchanged():
    source, rest = np.random.default_rng(1), np.random.default_rng(2)
    one = drafts(count=4)
    for _ in range(3):
        one.advance(np.arange(6)[None, None], gains(source, 1, 4), NONE)
    other = drafts(count=4)
    order = [2, 0, 3, 1]
    other.ids, other.scores, other.tails = one.ids[:, order], one.scores[:, order], one.tails[:, order]
    for _ in range(3):
        more = gains(rest, 1, 4)
        held = {tuple(ids): j for j, ids in enumerate(one.ids[0].tolist())}
        match = [held[tuple(ids)] for ids in other.ids[0].tolist()]
        one.advance(np.arange(6)[None, None], more, frozenset({5}))
        other.advance(np.arange(6)[None, None], more[:, match], frozenset({5}))
    a, b = ([(d.ids, round(d.score, 12)) for d in held.ranked(0)] for held in (one, other))
    assert a == b


@pytest.mark.parametrize("seed", range(20))
def test_oracle_10_an_early_stop_returns_the_same_drafts_as_running_to_the_end(seed):
    source = np.random.default_rng(seed)
    held, early = drafts(count=2, limit=25), None
    for _ in range(25):
        held.advance(np.arange(6)[None, None], gains(source, 1, 2), frozenset({1, 4}))
        if early is None and held.done(early=True)[0]:
            early = [d.ids for d in held.ranked(0)], held.length
        if held.done(early=False)[0]:
            break
    assert early is not None
    assert [d.ids for d in held.ranked(0)] == early[0]


def test_the_stop_is_early_where_a_finished_draft_can_no_longer_be_beaten():
    held = drafts(count=1, limit=10)
    held.count = 2
    held.scores, held.ids, held.tails = (
        np.array([[0.0, -np.inf]]),
        np.zeros((1, 2, 0), dtype=int),
        np.full((1, 2, 2), -1),
    )
    sure = np.log(np.array([[[0.6, 0.3, 1e-9, 1e-12]] * 2]))
    held.advance(np.arange(4)[None, None], sure, frozenset({0, 1}))
    assert held.done(early=True)[0] and not held.done(early=False)[0]
    assert [d.ids for d in held.ranked(0)] == [[0], [1]]


def test_ends_that_use_up_the_candidates_leave_fewer_drafts_and_none_is_revived():
    held = drafts(count=2)
    first = np.log(np.array([[[0.4, 0.3, 0.2, 0.07, 0.03]] * 2]))
    held.advance(np.arange(5)[None, None], first, frozenset({0, 1, 2}))
    assert held.scores[0, 0] == pytest.approx(np.log(0.07)) and held.scores[0, 1] == -np.inf
    assert [d.ids for d in held.finished[0]] == [[0], [1]]
    held.advance(np.arange(5)[None, None], np.where(first < np.log(0.05), -np.inf, first), frozenset({0, 1, 2}))
    assert {ids[0] for ids, s in zip(held.ids[0].tolist(), held.scores[0]) if s > -np.inf} == {3}
    ended = drafts(count=2)
    ended.advance(np.arange(4)[None, None], np.log(np.array([[[0.4, 0.3, 0.2, 0.1]] * 2])), frozenset(range(4)))
    assert ended.done(early=False)[0] and len(ended.ranked(0)) == 2


def test_a_judge_ends_drafts_by_what_they_say():
    held = drafts(count=2)
    first = np.log(np.array([[[0.5, 0.3, 0.2]] * 2]))
    held.advance(np.arange(3)[None, None], first, NONE, lambda p, ids: "stop" if ids == [0] else None)
    assert [(d.ids, d.reason) for d in held.finished[0]] == [([0], "stop")]
    assert held.ids[0, :, 0].tolist() == [1, 2]


def test_the_best_of_many_are_those_of_a_stable_sort():
    source = np.random.default_rng(3)
    values = source.integers(0, 40, (6, 2000)).astype(float)
    values[values < 38] = -np.inf
    values[0] = -np.inf
    values[0, 7] = 1.0
    want = np.argsort(-values, axis=1, kind="stable")[:, :9]
    found = best(values, 9)
    real = np.take_along_axis(values, want, 1) > -np.inf
    assert (found[real] == want[real]).all()
    assert (np.take_along_axis(values, found, 1) == np.take_along_axis(values, want, 1)).all()
