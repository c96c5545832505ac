"""The known densities: they integrate to one, their scores are gradients, their draws and convolutions fit."""

import math

import pytest
import torch

from quire.errors import ConfigError
from quire_dae_score.densities import DENSITIES
from quire_dae_score.toy import ToyDensity

NAMES = sorted(DENSITIES)
ROUGH = {"spiral": 0.02}
"""σ that each is convolved with here, in proportion to its size."""


def grid(half, points=400):
    axis = (torch.arange(points, dtype=torch.double) + 0.5) * (2 * half / points) - half
    return torch.cartesian_prod(axis, axis), (2 * half / points) ** 2


def sigma_of(name):
    return ROUGH.get(name, 0.3)


@pytest.mark.parametrize("name", NAMES)
def test_the_density_integrates_to_one(name):
    density = DENSITIES[name]()
    points, area = grid(density.half)
    assert float(density.log_prob(points).exp().sum() * area) == pytest.approx(1, abs=2e-3)
    points, area = grid(density.half + 5 * sigma_of(name), 120)
    assert float(density.log_prob(points, sigma_of(name)).exp().sum() * area) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_draws_follow_the_density(name):
    """E log p over draws against the sum over a grid, within 4 standard errors."""
    density = DENSITIES[name]()
    draws = density.log_prob(density.sample(20_000, torch.Generator().manual_seed(0)))
    points, area = grid(density.half)
    level = density.log_prob(points)
    expected = float((level.exp() * level).sum() * area)
    assert abs(float(draws.mean()) - expected) < 4 * float(draws.std()) / math.sqrt(20_000) + 3e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_convolution_is_what_noise_does(name):
    """p_σ at a few points against the mean of N(point; draw, σ²I) over draws of p."""
    density, sigma = DENSITIES[name](), sigma_of(name)
    at = density.sample(5, torch.Generator().manual_seed(1)).double()
    draws = density.sample(200_000, torch.Generator().manual_seed(2)).double()
    kernel = torch.exp(-torch.cdist(at, draws).square() / (2 * sigma**2)) / (2 * math.pi * sigma**2)
    error = kernel.std(1) / math.sqrt(kernel.shape[1])
    assert ((density.log_prob(at, sigma).exp() - kernel.mean(1)).abs() < 4 * error).all()


@pytest.mark.parametrize("name", [n for n in NAMES if n in ("ring", "ninja_star", "spiral")])
def test_the_table_is_the_density_at_its_nodes(name):
    density, sigma = DENSITIES[name](), sigma_of(name)
    level, slope = density.table(sigma)
    places = torch.randint(0, len(density.axis), (40, 2), generator=torch.Generator().manual_seed(0))
    points = torch.stack([density.axis[places[:, 0]], density.axis[places[:, 1]]], 1)
    high = density.log_prob(points, sigma) > -40
    torch.testing.assert_close(level[places[:, 0], places[:, 1]][high], density.log_prob(points, sigma)[high])
    torch.testing.assert_close(slope[:, places[:, 0], places[:, 1]].T[high], density.score(points, sigma)[high])


def test_scores_are_finite_everywhere_and_point_to_the_ring():
    ring = DENSITIES["ring"]()
    out = ring.score(torch.tensor([[3.0, 0.0], [0.0, -1.0], [0.0, 0.0]]))
    assert torch.isfinite(out).all() and out[0, 0] < 0 and out[1, 1] < 0
    assert float(out[0, 0]) == pytest.approx(-(3 - 2) / 0.04 - 1 / 3)


def test_splits_are_draws_of_their_own_that_repeat():
    data = ToyDensity("ring", samples=800)
    train, val = data.dataset("train").tensors["vector"], data.dataset("val").tensors["vector"]
    assert train.shape == (800, 2) and val.shape == (100, 2) and not torch.equal(train[:100], val)
    assert torch.equal(ToyDensity("ring", samples=800).dataset("train").tensors["vector"], train)
    assert not torch.equal(ToyDensity("ring", samples=800, seed=1).dataset("train").tensors["vector"], train)


@pytest.mark.parametrize("given", [{"kind": "butterfly"}, {"samples": 7}])
def test_impossible_arguments_are_refused(given):
    with pytest.raises(ConfigError, match=r"^ToyDensity\.(kind|samples) must be "):
        ToyDensity(**given)
