"""Path energies (spec, sections 3 and 7): exact where a rule is, and enough points between modes."""

import pytest
import torch

from quire.errors import ConfigError
from quire_dae_score.densities import Mixture
from quire_dae_score.energy import check_quadrature, energy_difference, rule

S = torch.tensor([[2.0, 0.8], [0.8, 1.0]], dtype=torch.double)
X = torch.tensor([[0.3, -0.7]], dtype=torch.double)
Y = torch.tensor([[1.1, 0.4]], dtype=torch.double)
MODES = Mixture([[-2.0], [2.0]], [[0.25]], [0.3, 0.7])
"""The spec's mixture on a line, section 3."""


def score(x):
    return -(x @ torch.linalg.inv(S + 0.25 * torch.eye(2, dtype=torch.double)))


def between_modes(sigma, quadrature, count=3000):
    """Errors of random pairs in [−4, 4], and the estimates of them."""
    x, y = 8 * torch.rand(2, count, 1, generator=torch.Generator().manual_seed(1), dtype=torch.double) - 4
    found, error = energy_difference(lambda at: MODES.score(at, sigma), x, y, sigma, quadrature)
    true = MODES.log_prob(x, sigma) - MODES.log_prob(y, sigma)
    return (found - true).abs(), error


@pytest.mark.parametrize("quadrature", [1, 2, 5, "trapezoid", "scaled", "adaptive"])
def test_every_rule_but_the_local_one_is_exact_for_a_linear_score(quadrature):
    """Oracle 3: ΔE = −.0880322."""
    found, _ = energy_difference(score, X, Y, 0.5, quadrature)
    assert float(found) == pytest.approx(-0.0880322, abs=5e-8)
    exact, _ = energy_difference(score, X, Y, 0.5, "trapezoid")
    assert abs(float(found - exact)) < 1e-12


def test_the_first_order_difference_is_several_times_too_large():
    """Oracle 3: −.574683."""
    found, _ = energy_difference(score, X, Y, 0.5, "first")
    assert float(found) == pytest.approx(-0.574683, abs=1e-6)


@pytest.mark.parametrize(
    ("sigma", "points", "worst", "average"),
    [
        (0.2, 1, 46, 7.9),
        (0.2, 2, 17, 2.6),
        (0.2, 5, 10.5, 1.16),
        (0.2, 10, 3.9, 0.35),
        (0.2, 20, 1.15, 0.059),
        (0.5, 1, 24, 4.1),
        (0.5, 2, 9.1, 1.3),
        (0.5, 5, 4.8, 0.45),
        (0.5, 10, 1.4, 0.089),
        (0.5, 20, 0.20, 0.0060),
    ],
)
def test_errors_between_modes_are_those_of_the_spec(sigma, points, worst, average):
    """Section 3's table; the pairs are other draws, so within a quarter of the mean and a third of the maximum."""
    error, _ = between_modes(sigma, points)
    assert float(error.mean()) == pytest.approx(average, rel=0.25)
    assert float(error.max()) == pytest.approx(worst, rel=0.34)


@pytest.mark.parametrize("sigma", [0.1, 0.2, 0.5])
def test_the_scaled_rule_is_enough_between_modes_where_five_points_are_not(sigma):
    scaled, _ = between_modes(sigma, "scaled")
    five, _ = between_modes(sigma, 5)
    assert scaled.mean() < 0.01 and scaled.mean() < five.mean() / 50


@pytest.mark.parametrize("sigma", [0.1, 0.2, 0.5])
def test_the_adaptive_rule_keeps_its_tolerance_and_says_so(sigma):
    error, estimate = between_modes(sigma, "adaptive")
    assert error.max() < 1e-3 and estimate.max() < 1e-2 * 1.001
    assert (error <= estimate + 1e-6).double().mean() > 0.99


def test_two_poor_estimates_that_agree_do_not_end_the_halving():
    """From −2 to 2 the score turns within 0.07: halving one piece of the whole way once missed 1.5 nats."""
    x, y = torch.full((200, 1), -2.0), torch.linspace(1.5, 3.5, 200)[:, None]
    found, _ = energy_difference(lambda at: MODES.score(at, 0.1), x.double(), y.double(), 0.1, "adaptive")
    assert (found - (MODES.log_prob(x, 0.1) - MODES.log_prob(y, 0.1))).abs().max() < 1e-2


def test_short_steps_need_two_points_only():
    """Steps up to σ (spec, section 3)."""
    draws = torch.Generator().manual_seed(2)
    x = 8 * torch.rand(3000, 1, generator=draws, dtype=torch.double) - 4
    y = x + 0.2 * (2 * torch.rand(3000, 1, generator=draws, dtype=torch.double) - 1)
    found, _ = energy_difference(lambda at: MODES.score(at, 0.2), x, y, 0.2, 2)
    assert (found - (MODES.log_prob(x, 0.2) - MODES.log_prob(y, 0.2))).abs().max() < 0.02


def test_the_estimate_of_the_error_bounds_it_nearly_always():
    error, estimate = between_modes(0.2, "scaled")
    assert (error <= estimate + 1e-9).double().mean() > 0.99
    assert torch.isnan(between_modes(0.2, "first", 5)[1]).all() and torch.isnan(between_modes(0.2, 1, 5)[1]).all()


def test_the_number_of_points_follows_the_distance_row_by_row():
    seen = []

    def counting(at):
        seen.append(len(at))
        return torch.zeros_like(at)

    x, y = torch.zeros(4, 1), torch.tensor([[0.1], [1.0], [2.0], [1000.0]])
    energy_difference(counting, x, y, 0.2)
    assert sum(seen) == 5 + 20 + 40 + 64


@pytest.mark.parametrize("points", [1, 2, 3, 7, 16, 33, 64])
def test_rules_integrate_polynomials(points):
    """n points to degree 2n−1, every second one to degree ⌈n/2⌉−1."""
    nodes, fine, coarse = rule(points)
    for degree in range(2 * points):
        assert float((fine * nodes**degree).sum()) == pytest.approx(1 / (degree + 1), abs=1e-12)
    for degree in range((points + 1) // 2):
        assert float((coarse * nodes**degree).sum()) == pytest.approx(1 / (degree + 1), abs=1e-10)


def test_images_are_paths_too():
    x, y = torch.rand(3, 1, 4, 4, dtype=torch.double), torch.rand(3, 1, 4, 4, dtype=torch.double)
    found, _ = energy_difference(lambda at: -at, x, y, 1.0)
    expected = (y.square() - x.square()).flatten(1).sum(1) / 2
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("value", ["simpson", 0, 65, True])
def test_unknown_rules_are_refused(value):
    with pytest.raises(
        ConfigError, match="quadrature must be scaled, adaptive, trapezoid, first or a number of points"
    ):
        check_quadrature(value, object())
