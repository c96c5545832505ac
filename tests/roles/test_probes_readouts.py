"""The readouts by themselves: nearest neighbours, exact and descending linear layers, the attentive query."""

from __future__ import annotations

import math

import pytest
import torch

from quire import ConfigError
from quire.roles.probes.attentive import AttentiveProbe, AttentiveReadout
from quire.roles.probes.features import Features
from quire.roles.probes.knn import KNNProbe, vote
from quire.roles.probes.linear import L2, LinearProbe, descend, solve, standardise
from quire.roles.probes.subject import Subject


def clusters(count=60, classes=3, width=8, seed=0):
    """Clusters far apart: unit vectors of noise 0.05 round orthogonal axes."""
    draw = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % classes
    return torch.eye(width)[label] + 0.05 * torch.randn(count, width, generator=draw), label


def subject():
    return Subject(None, None, torch.device("cpu"))


def features(values, label=None, mask=None):
    return Features(values, torch.arange(len(values)), mask, label)


def test_one_neighbour_on_its_own_training_set_is_always_right():
    # oracle of role-tokens 6: k=1 on its own training set gives 100 %
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(1))
    y = torch.randint(7, (200,), generator=torch.Generator().manual_seed(2))
    assert torch.equal(vote(x, y, x, 1, 0.07, 7), y)


def test_clusters_far_apart_are_told_apart_by_every_probe():
    # oracle of role-tokens 6: three clusters far apart give 100 %
    (x, y), (z, wanted) = clusters(), clusters(seed=5)
    assert torch.equal(vote(x, y, z, 20, 0.07, 3), wanted)
    assert torch.equal(solve(*_standard(x, y, z))[0], wanted)
    a, b = standardise(x, z)
    assert torch.equal(descend(a, y, b, 3, epochs=20, lr=0.1), wanted)
    probe = AttentiveProbe(epochs=30)
    found, _ = probe.predict(features(x[:, None], y), features(z[:, None]), 3, subject())
    assert torch.equal(found, wanted)


def _standard(x, y, z):
    a, b = standardise(x, z)
    return a, y, b


def test_shuffled_labels_give_chance():
    # oracle of role-tokens 6: shuffled labels = chance within 3 standard errors
    draw = torch.Generator().manual_seed(3)
    x, z = torch.randn(600, 6, generator=draw), torch.randn(600, 6, generator=draw)
    y, wanted = torch.randint(4, (600,), generator=draw), torch.randint(4, (600,), generator=draw)
    for found in (vote(x, y, z, 20, 0.07, 4), solve(*_standard(x, y, z))[0]):
        accuracy = float((found == wanted).double().mean())
        assert abs(accuracy - 0.25) < 3 * math.sqrt(0.25 * 0.75 / 600)


def test_neighbours_are_weighted_by_exp_of_similarity_over_temperature():
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    # weights exp(1/T) against 2 exp(0.6/T): equal at T = 0.4 / ln 2 = 0.577
    assert vote(bank, labels, query, 3, 0.57, 2).item() == 0
    assert vote(bank, labels, query, 3, 0.59, 2).item() == 1


def test_k_is_clipped_to_the_training_samples_and_tiny_temperatures_do_not_overflow():
    x, y = clusters(6)
    found, setting = KNNProbe(k=500, temperature=1e-6).predict(features(x, y), features(x), 3, subject())
    assert torch.equal(found, y)
    assert setting["k"] == 6


def test_scaling_features_does_not_change_cosine_neighbours():
    (x, y), (z, _) = clusters(), clusters(seed=4)
    assert torch.equal(vote(x, y, z, 5, 0.07, 3), vote(7 * x, y, 0.01 * z, 5, 0.07, 3))


def test_standardising_uses_training_statistics_only():
    x, z = torch.randn(50, 3) * 4 + 2, torch.randn(20, 3) * 100
    a, b = standardise(x, z)
    assert a.mean(0).abs().max() < 1e-5 and (a.var(0, unbiased=False) - 1).abs().max() < 1e-4
    assert torch.equal(b[:5], standardise(x, z[:5])[1])


def test_the_penalty_is_chosen_on_training_samples_and_noise_asks_for_a_strong_one():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 40, generator=draw), torch.randint(2, (60,), generator=draw)
    x[:, 0] += 1.5 * y
    a, _ = standardise(x, x)
    _, noisy = solve(a, y, a)
    (c, label) = clusters(300)
    _, clean = solve(standardise(c, c)[0], label, c)
    assert noisy in L2 and clean in L2
    assert noisy >= 1e-2


def test_the_exact_solve_is_the_minimum_of_the_penalised_loss():
    # gradient of mean cross-entropy + l2/2 |w|² vanishes at the solution (own derivation)
    from quire.roles.probes.linear import _fits

    x, y = clusters(90)
    x = x + torch.randn(90, 8, generator=torch.Generator().manual_seed(9))
    (fit,) = _fits(x, y, (1e-2,))
    w = torch.tensor(fit.coef_, requires_grad=True)
    b = torch.tensor(fit.intercept_, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(x.double() @ w.T + b, y) + 0.5e-2 * w.square().sum()
    assert max(g.abs().max().item() for g in torch.autograd.grad(loss, (w, b))) < 1e-4


def test_one_class_in_training_is_answered_with_that_class():
    x = torch.randn(8, 3)
    found, _ = solve(x, torch.full((8,), 2), torch.randn(4, 3))
    assert found.tolist() == [2, 2, 2, 2]


def test_large_data_descends_and_small_data_is_solved(monkeypatch):
    x, y = clusters(300)
    train, judged = features(x, y), features(x)
    assert LinearProbe().predict(train, judged, 3, subject())[1]["solver"] == "exact"
    monkeypatch.setattr("quire.roles.probes.linear.SMALL", 100)
    found, setting = LinearProbe(epochs=20).predict(train, judged, 3, subject())
    assert setting["solver"] == "sgd"
    assert torch.equal(found, y)


def test_the_attentive_query_starts_at_zero_and_therefore_as_a_mean_over_real_tokens():
    torch.manual_seed(0)
    readout = AttentiveReadout(8, 3, heads=2)
    assert not readout.query.any()
    # zero query → keys are weighted by the bias alone; without it all weights are equal
    torch.nn.init.zeros_(readout.to_q.bias)
    tokens = torch.randn(4, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 4, dtype=torch.bool)
    expected = readout.proj(readout.to_v(readout.norm_v(tokens[:, :3])).mean(1))
    assert torch.allclose(readout.attend(tokens, mask), expected, atol=1e-6)


def test_the_attentive_readout_ignores_padding_and_the_order_of_tokens():
    torch.manual_seed(1)
    readout = AttentiveReadout(8, 3).eval()
    torch.nn.init.normal_(readout.query)
    tokens, mask = torch.randn(2, 6, 8), torch.tensor([[1, 1, 1, 1, 0, 0]] * 2, dtype=torch.bool)
    other = tokens.clone()
    other[:, 4:] = 100.0
    assert torch.equal(readout(tokens, mask), readout(other, mask))
    assert torch.allclose(readout(tokens[:, [3, 1, 0, 2]]), readout(tokens[:, :4]), atol=1e-6)


def test_the_attentive_probe_finds_the_one_informative_token_where_the_mean_hides_it():
    draw = torch.Generator().manual_seed(0)

    def sample(count):
        tokens = torch.randn(count, 12, 8, generator=draw)
        label = torch.arange(count) % 2
        place = torch.randint(12, (count,), generator=draw)
        tokens[torch.arange(count), place] = torch.eye(8)[label] * 6  # a big token names the class
        noise = torch.randn(count, 1, 8, generator=draw) * 3
        return tokens + noise * torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1]), label

    (x, y), (z, wanted) = sample(512), sample(256)
    found, _ = AttentiveProbe(epochs=60).predict(features(x, y), features(z), 2, subject())
    a, b = standardise(x.mean(1), z.mean(1))
    attentive, mean = ((f == wanted).double().mean() for f in (found, solve(a, y, b)[0]))
    assert attentive > mean
    assert attentive > 0.9


def test_the_attentive_batchnorm_ends_with_statistics_of_all_training_samples():
    torch.manual_seed(0)
    readout = AttentiveReadout(4, 2)
    attended = torch.randn(37, 4) * 3 + 1
    readout.settle(attended)
    assert torch.allclose(readout.norm.running_mean, attended.mean(0))
    assert torch.allclose(readout.norm.running_var, attended.var(0, unbiased=False))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: KNNProbe(k=0), "KNNProbe needs k of at least 1"),
        (lambda: KNNProbe(temperature=0.0), "temperature above 0"),
        (lambda: KNNProbe(every=-1), "KNNProbe.every must be at least 0"),
        (lambda: KNNProbe(max_train=0), "KNNProbe.max_train must be at least 1"),
        (lambda: KNNProbe(pooling="max"), "KNNProbe.pooling must be mean or class, got 'max'"),
        (lambda: LinearProbe(lr=0.0), "LinearProbe needs epochs of at least 1 and lr above 0"),
        (lambda: LinearProbe(solver="newton"), "LinearProbe.solver must be auto, exact or sgd"),
        (lambda: AttentiveProbe(heads=0), "AttentiveProbe needs heads and epochs of at least 1"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_name(make, said):
    with pytest.raises(ConfigError, match=said):
        make()
