"""Lookup, fetched values and keys: the numbers of the spec, section 7."""

import pytest
import torch

from quire_dkvb.modules import Averages, bag, distortion, ema_step, kmeans, nearest, random_heads, softly


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- lookup
def test_the_lookup_equals_brute_force():
    """Oracle 4."""
    heads, keys = draws(50, 3, 5), draws(3, 40, 5, seed=1)
    found = nearest(heads, keys)
    assert found.shape == (50, 3, 1)
    for c in range(3):
        brute = torch.stack([(h - keys[c]).square().sum(1).argmin() for h in heads[:, c]])
        assert torch.equal(found[:, c, 0], brute)


def test_equal_keys_give_the_lowest_index():
    """Oracle 4: a matrix product would break this tie by where a key stands."""
    keys = draws(1, 300, 7)
    keys[0, [40, 131, 299]] = keys[0, 12].clone()
    heads = (keys[0, 12] + 1e-3 * draws(200, 7, seed=2))[:, None]
    assert set(nearest(heads, keys).flatten().tolist()) == {12}


def test_near_keys_far_from_the_origin_are_told_apart():
    """Expanding the square in float32 would lose them: 1000² has 6 digits before the point."""
    keys = (1000 + 0.01 * torch.arange(20.0)).view(1, 20, 1).repeat(1, 1, 3)
    heads = keys.transpose(0, 1) + 0.002
    assert nearest(heads, keys).flatten().tolist() == list(range(20))


def test_chunks_change_nothing(monkeypatch):
    heads, keys = draws(70, 5, 4), draws(5, 30, 4, seed=1)
    once, several = nearest(heads, keys, 2), None
    monkeypatch.setattr("quire_dkvb.modules.HELD", 30 * 16)
    several = nearest(heads, keys, 2)
    assert torch.equal(once, several)


def test_top_k_are_the_k_nearest_and_excluded_keys_are_never_found():
    heads, keys = draws(20, 2, 4), draws(2, 12, 4, seed=1)
    three = nearest(heads, keys, 3)
    gaps = (heads[:, :, None] - keys[None]).square().sum(-1)
    assert torch.equal(three.sort(-1).values, gaps.topk(3, largest=False).indices.sort(-1).values)
    allowed = torch.ones(2, 12, dtype=torch.bool)
    allowed[0, nearest(heads, keys)[:, 0].flatten().unique()] = False
    left = nearest(heads, keys, allowed=allowed)
    assert bool(allowed[0, left[:, 0].flatten()].all())
    assert torch.equal(left[:, 1], nearest(heads, keys)[:, 1])


def test_random_heads_have_columns_of_unit_length():
    R = random_heads(30, 4, 5)
    torch.testing.assert_close(R.norm(dim=0), torch.ones(4, 5))
    assert R.std() > 0.1


# ---- values
def test_a_bag_is_the_weighted_sum_and_its_gradient_is_autograds():
    table, rows, weights = draws(12, 3).requires_grad_(), torch.randint(12, (5, 7)), torch.rand(5, 7)
    ours = bag(table, rows, weights)
    plain = (table[rows] * weights[..., None]).sum(1)
    torch.testing.assert_close(ours, plain)
    (a,), (b,) = (torch.autograd.grad((out * draws(5, 3, seed=3)).sum(), table) for out in (ours, plain))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(bag(table, rows), table[rows].sum(1))


def test_the_soft_lookup_follows_the_features_and_is_hard_where_keys_are_far_apart():
    keys, values = 100 * draws(2, 5, 3), draws(2, 5, 4, seed=1)
    heads = (keys[:, [1, 3]].transpose(0, 1) + 0.1).requires_grad_()
    soft = softly(heads, keys, values)
    torch.testing.assert_close(soft, values[:, [1, 3]].transpose(0, 1))
    assert softly(draws(4, 2, 3).requires_grad_(), draws(2, 5, 3, seed=4), values).requires_grad


# ---- keys
def clusters(seed=0):
    """Three clusters a codebook, and keys of which each is nearest to one."""
    centres = torch.tensor([[[0.0, 0], [10, 0], [0, 10]], [[5.0, 5], [-9, 0], [0, -9]]])
    chosen = torch.randint(3, (60, 2), generator=generator(seed))
    heads = centres[torch.arange(2), chosen] + 0.1 * draws(60, 2, 2)
    return centres + 0.5, chosen, heads


def test_without_memory_one_batch_puts_keys_on_cluster_means():
    """Oracle 6: gamma 0."""
    keys, chosen, heads = clusters()
    ema_step(keys, Averages.start(keys, 0.0), heads, 0.0, 0.0, generator())
    for c in range(2):
        for j in range(3):
            torch.testing.assert_close(keys[c, j], heads[chosen[:, c] == j, c].mean(0), atol=1e-4, rtol=0)


def test_a_constant_head_is_where_its_key_goes():
    """Oracle 6."""
    keys, heads = draws(2, 4, 3), torch.ones(30, 2, 3)
    averages, first = Averages.start(keys, 0.0), nearest(heads, keys)[0, :, 0]
    for _ in range(5):
        ema_step(keys, averages, heads, 0.9, 0.0, generator())
    torch.testing.assert_close(keys[torch.arange(2), first], torch.ones(2, 3), atol=1e-4, rtol=0)


def test_averages_are_the_papers_by_hand():
    """gamma .5, M = 2: sizes .5·2+.5·3 and .5·2+.5·1; K = average / laplace(size)."""
    keys = torch.tensor([[[0.0], [10.0]]])
    averages = Averages.start(keys, 2.0)
    heads = torch.tensor([1.0, 2.0, 3.0, 9.0])[:, None, None]
    ema_step(keys, averages, heads, 0.5, 0.0, generator())
    assert averages.size.tolist() == [[2.5, 1.5]]
    wanted = [(0.5 * 0 + 0.5 * 6) / 2.5, (0.5 * 20 + 0.5 * 9) / 1.5]
    torch.testing.assert_close(keys.flatten(), torch.tensor(wanted), atol=1e-3, rtol=0)


def test_unused_keys_stay_where_they_are_unless_dead_and_never_blow_up():
    keys = torch.tensor([[[0.0, 0], [50, 50]]])
    averages, heads = Averages.start(keys, 0.0), 0.1 * draws(20, 1, 2)
    for _ in range(40):
        ema_step(keys, averages, heads, 0.95, 0.0, generator())
    assert keys[0, 1].tolist() == [50, 50]


def test_a_dead_key_becomes_a_head_vector_and_stays_one():
    """The averages are set too: else the next step would undo the replacement."""
    heads = 0.1 * draws(20, 1, 2)
    keys = torch.tensor([[[0.0, 0], [50, 50]]])
    averages, draw = Averages.start(keys, 0.0), generator()
    _, gone = ema_step(keys, averages, heads, 0.0, 0.1, draw)
    assert gone == 1
    assert (heads[:, 0] == keys[0, 1]).all(1).any()
    ema_step(keys, averages, heads, 0.95, 0.1, draw)
    assert keys.abs().max() < 1


def test_kmeans_with_enough_centres_loses_nothing():
    """Oracle 6: M at least the number of distinct points."""
    points = draws(7, 2, 3)
    heads = points[torch.randint(7, (40,), generator=generator())]
    assert distortion(heads, kmeans(heads, 9, generator())) < 1e-10
    assert distortion(heads, kmeans(heads, 3, generator())) > 1e-3


def test_kmeans_finds_clusters():
    _, chosen, heads = clusters()
    keys = kmeans(heads, 3, generator())
    means = torch.stack([torch.stack([heads[chosen[:, c] == j, c].mean(0) for j in range(3)]) for c in range(2)])
    torch.testing.assert_close(torch.cdist(means, keys).amin(-1), torch.zeros(2, 3), atol=1e-4, rtol=0)


def test_distortion_is_one_for_the_mean_alone():
    heads = draws(500, 4, 3)
    assert distortion(heads, heads.mean(0)[:, None]) == pytest.approx(1, abs=0.02)
