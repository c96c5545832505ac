"""Jacobians (spec, section 7, 7): three norms agree, rows don't mix, and a gradient's Jacobian is symmetric."""

import pytest
import torch
from torch import nn

from quire.errors import ConfigError
from quire_dae_score.energy import energy_difference
from quire_dae_score.jacobian import asymmetry, difference_norm, exact, exact_norm, hutchinson_norm
from quire_dae_score.modules import ScoreMlp
from quire_dae_score.objective import Denoising


def network(width=6):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 32), nn.SiLU(), nn.Linear(32, width)).double()


def points(count=5, width=6):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1), dtype=torch.double)


def test_the_exact_jacobian_is_each_rows_own():
    net, x = network(), points()
    found = exact(net, x)
    for row, value in zip(found, x):
        torch.testing.assert_close(row, torch.autograd.functional.jacobian(net, value))


def test_exact_hutchinson_and_difference_norms_agree():
    """Oracle 7: many probes, 3 standard errors; the difference has a bias of order h² besides."""
    net, x = network(), points()
    true = exact_norm(net, x)
    for norm in (hutchinson_norm, lambda f, x, p, g: difference_norm(f, x, p, 1e-3, g)):
        draws = torch.stack([norm(net, x, 1, torch.Generator().manual_seed(i)) for i in range(800)])
        error = draws.std(0) / len(draws) ** 0.5
        assert ((draws.mean(0) - true).abs() < 3.5 * error + 1e-3 * true).all()
        assert draws.std(0).min() > 0


def test_more_probes_estimate_better():
    net, x = network(), points()
    spread = [
        torch.stack([hutchinson_norm(net, x, p, torch.Generator().manual_seed(i)) for i in range(200)]).std(0).mean()
        for p in (1, 16)
    ]
    assert float(spread[0] / spread[1]) == pytest.approx(4, rel=0.25), "the standard deviation falls with √probes"


def test_signs_are_exact_for_a_multiple_of_an_orthogonal_map():
    """‖cQᵀv‖² = c²‖v‖² for every v of signs: no variance, unlike Gaussian probes."""
    turn = torch.linalg.qr(points(6)).Q
    found = hutchinson_norm(lambda x: 3 * x @ turn, points(), 1)
    torch.testing.assert_close(found, torch.full_like(found, 54.0))


def test_the_penalty_has_a_gradient():
    net, x = network(), points()
    for norm in (exact_norm, lambda f, x: hutchinson_norm(f, x, 2), lambda f, x: difference_norm(f, x, 2, 1e-2)):
        net.zero_grad()
        norm(net, x).mean().backward()
        assert all(
            p.grad is not None and p.grad.abs().sum() > 0 for n, p in net.named_parameters() if "2.bias" not in n
        )


def test_too_many_columns_are_refused_for_the_exact_one():
    with pytest.raises(ConfigError, match="^d is 784, use jacobian=hutchinson$"):
        exact(lambda x: x, torch.zeros(2, 1, 28, 28))


def loop(score, corners):
    """The energy gained on a closed way round ``corners`` [k,D]."""
    way = torch.cat([corners, corners[:1]])
    return energy_difference(score, way[:-1], way[1:], 0.1, 64)[0].sum()


@pytest.mark.parametrize("residual", [True, False])
def test_a_conservative_models_score_is_a_gradient_and_a_free_ones_is_not(make, residual):
    """Oracle 7: asymmetry below 1e-5, closed-loop energy 0."""
    found = {}
    for conservative in (True, False):
        objective = Denoising(0.5, "vector", residual=residual, conservative=conservative)
        model = make(objective, encoder=ScoreMlp(widths=[32])).double()
        x = points(20, 2)
        jacobian = exact(lambda at, m=model: m.objective.score(m, at), x)
        corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [-1.0, 1.0]], dtype=torch.double)
        around = loop(lambda at, m=model: m.objective.score(m, at), corners)
        found[conservative] = float(asymmetry(jacobian).max()), abs(float(around))
    assert found[True][0] < 1e-5 and found[True][1] < 1e-6
    assert found[False][0] > 1e-2 and found[False][1] > 1e-3


def test_a_conservative_models_score_is_the_slope_of_its_energy(make):
    model = make(Denoising(0.5, "vector", conservative=True)).double()
    x = points(4, 2).requires_grad_()
    model.objective.energy(model, {"vector": x}, 0.5).sum().backward()
    torch.testing.assert_close(model.objective.score(model, x.detach()), -x.grad)
    made = model.objective.restore(model, {"vector": x.detach()}, 0.5)
    torch.testing.assert_close(made, x.detach() - 0.25 * x.grad)
