"""Chains against closed forms (spec, section 7, 4 to 6): covariances, detailed balance, mass of two modes."""

import math

import pytest
import torch

from quire.errors import DataError
from quire_dae_score.chains import Walk, run
from quire_dae_score.densities import Mixture, gaussian
from quire_dae_score.mixing import effective_of_each, effective_samples

S = torch.tensor([[2.0, 0.8], [0.8, 1.0]], dtype=torch.double)
SIGMA = 0.5
SMOOTH = S + SIGMA**2 * torch.eye(2, dtype=torch.double)
MODES = Mixture([[-2.0], [2.0]], [[0.25]], [0.3, 0.7])


def score(x):
    return -(x @ torch.linalg.inv(SMOOTH).to(x.dtype))


def curved(x):
    """The Jacobian of a code that turns with x, for proposals along it."""
    return torch.stack([1 + 0.5 * torch.sin(x[:, 1]), 0.5 * torch.cos(x[:, 0])], 1)[:, None]


def states(chains=1000, steps=600, burn_in=100, sigma=SIGMA, **given):
    """Chains from draws of the target, so that only what they do to it shows; float32 as in a model."""
    draws = torch.Generator().manual_seed(0)
    root = torch.linalg.cholesky(SMOOTH)
    start = (torch.randn(chains, 2, generator=draws, dtype=torch.double) @ root.T).float()
    walk = Walk(score, sigma, **given)
    return run(walk, start, steps, burn_in, 1, generator=draws)


def covariance(found):
    """Of all states, with the standard error by effective sample size of each product's own chain."""
    flat = found.samples.double()
    products = torch.stack([flat[..., 0] ** 2, flat[..., 0] * flat[..., 1], flat[..., 1] ** 2], -1)
    error = products.flatten(0, 1).std(0) / effective_samples(products).sqrt()
    return products.mean((0, 1)), error


def entries(matrix):
    return torch.stack([matrix[0, 0], matrix[0, 1], matrix[1, 1]])


def of_eigenvalues(change):
    values, vectors = torch.linalg.eigh(S)
    return entries(vectors @ torch.diag(change(values)) @ vectors.T)


EXPECTED = {
    "random_walk": entries(SMOOTH),
    "mala": entries(SMOOTH),
    "jacobian": entries(SMOOTH),
    "langevin": of_eigenvalues(lambda v: 2 * (v + SIGMA**2) ** 2 / (2 * v + SIGMA**2)),
    "alternate": of_eigenvalues(lambda v: 2 * v**2 / (2 * v + SIGMA**2)),
}


@pytest.mark.parametrize(
    ("kind", "given", "acceptance"),
    [
        ("random_walk", {"step": 1.0}, 0.60),
        ("mala", {}, 0.96),
        ("mala", {"drift": 0.5}, None),
        ("langevin", {}, 1.0),
        ("alternate", {}, 1.0),
        ("jacobian", {"step": 1.0, "tangent": curved}, None),
    ],
)
def test_stationary_covariances_are_the_closed_ones(kind, given, acceptance):
    """Oracle 4, within 3 standard errors by effective size."""
    found = states(kind=kind, **given)
    mean, error = covariance(found)
    assert ((mean - EXPECTED[kind]).abs() < 3 * error).all(), (mean, EXPECTED[kind], error)
    assert (error < 0.06).all(), "precise enough to tell the samplers apart"
    if acceptance is not None:
        assert float(found.accepted.mean()) == pytest.approx(acceptance, abs=0.01)


def test_the_closed_covariances_of_the_unadjusted_chains_are_the_specs():
    target = [[2.25, 0.8], [0.8, 1.25]]
    torch.testing.assert_close(EXPECTED["random_walk"], entries(torch.tensor(target, dtype=torch.double)))
    for kind, matrix in (("langevin", [[2.36, 0.78], [0.78, 1.39]]), ("alternate", [[1.87, 0.78], [0.78, 0.89]])):
        torch.testing.assert_close(EXPECTED[kind], entries(torch.tensor(matrix).double()), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("step", "matrix", "steps"), [(1.0, [[4.17, 1.37], [1.37, 2.46]], 600), (0.3, [[2.70, 0.93], [0.93, 1.52]], 2000)]
)
def test_the_first_order_energy_biases_a_chain_and_less_with_a_smaller_step(step, matrix, steps):
    """Oracle 4's control; the bias at each step is the spec's, and far more than the error."""
    found = states(steps=steps, burn_in=steps // 3, kind="random_walk", step=step, quadrature="first")
    mean, error = covariance(found)
    torch.testing.assert_close(mean, entries(torch.tensor(matrix).double()), atol=0.12, rtol=0)
    assert mean[0] - EXPECTED["random_walk"][0] > 5 * error[0]


# ---- detailed balance
def log_proposal(walk, x, y):
    """log q(y|x), written again."""
    if walk.kind == "jacobian":
        jacobian = curved(x)
        cover = walk.step**2 * (
            jacobian.transpose(1, 2) @ jacobian / jacobian.square().sum((1, 2), keepdim=True)
            + 0.01 * torch.eye(2, dtype=torch.double)
        )
        return torch.distributions.MultivariateNormal(x, cover).log_prob(y)
    if walk.kind == "random_walk":
        return torch.distributions.Normal(x, walk.step).log_prob(y).sum(1)
    centre = x + walk.drift * SIGMA**2 * score(x)
    return torch.distributions.Normal(centre, math.sqrt(2 * walk.drift) * SIGMA).log_prob(y).sum(1)


@pytest.mark.parametrize("kind", ["random_walk", "mala", "jacobian"])
@pytest.mark.parametrize("quadrature", ["scaled", "first"])
def test_detailed_balance_holds_and_fails_for_the_local_energy(kind, quadrature):
    """Oracle 5: π(x)q(y|x)a = π(y)q(x|y)a to 1e-10."""
    draws = torch.Generator().manual_seed(3)
    x, y = 2 * torch.randn(2, 500, 2, generator=draws, dtype=torch.double)
    walk = Walk(score, SIGMA, kind, step=0.7, drift=0.8, quadrature=quadrature, tangent=curved)
    target = gaussian()
    there = target.log_prob(x, SIGMA) + log_proposal(walk, x, y) + walk.log_accept(x, y)[0].clamp(max=0)
    back = target.log_prob(y, SIGMA) + log_proposal(walk, y, x) + walk.log_accept(y, x)[0].clamp(max=0)
    worst = float((there.exp() - back.exp()).abs().max())
    apart = float((there - back).abs().max())
    if quadrature == "scaled":
        assert worst < 1e-10 and apart < 1e-9
    else:
        assert apart > 1


# ---- two modes
def test_long_steps_find_the_mass_of_both_modes():
    """Oracle 6: .69906 at σ = .5, τ = 2, within .02; acceptance .46."""
    start = torch.zeros(500, 1, dtype=torch.double)
    walk = Walk(lambda x: MODES.score(x, 0.5), 0.5, step=2.0)
    found = run(walk, start, 800, 100, 5, generator=torch.Generator().manual_seed(0))
    assert float((found.samples > 0).double().mean()) == pytest.approx(0.69906, abs=0.02)
    assert float(found.accepted.mean()) == pytest.approx(0.46, abs=0.02)


@pytest.mark.parametrize(("quadrature", "mass"), [("scaled", 0.700), (5, 0.616)])
def test_five_points_everywhere_give_the_wrong_mass(quadrature, mass):
    """Section 3: τ = 2, σ = .2: .616 instead of .700."""
    start = MODES.sample(500, torch.Generator().manual_seed(1)).double()
    walk = Walk(lambda x: MODES.score(x, 0.2), 0.2, step=2.0, quadrature=quadrature)
    found = run(walk, start, 500, 200, 5, generator=torch.Generator().manual_seed(0))
    assert float((found.samples > 0).double().mean()) == pytest.approx(mass, abs=0.03)


@pytest.mark.parametrize(("sigma", "mass"), [(0.5, 0.69906), (0.2, 0.69996)])
def test_the_exact_masses_are_the_specs(sigma, mass):
    grid = torch.linspace(0, 12, 200_001, dtype=torch.double)[:, None]
    total = torch.trapezoid(MODES.log_prob(grid, sigma).exp(), grid[:, 0])
    assert float(total) == pytest.approx(mass, abs=1e-5)


# ---- the loop
def test_a_chain_is_the_same_alone_and_under_thinning():
    start, walk = torch.zeros(4, 2), Walk(score, SIGMA, step=0.5)

    def again(steps, burn_in, thin):
        return run(walk, start, steps, burn_in, thin, generator=torch.Generator().manual_seed(5)).samples

    every = again(40, 0, 1)
    assert torch.equal(again(40, 10, 3), every[:, 12::3]) and again(40, 10, 3).shape == (4, 10, 2)


def test_moves_out_of_the_box_are_refused_and_counted():
    start = torch.full((50, 2), 0.5)
    found = run(Walk(lambda x: torch.zeros_like(x), 1.0, step=0.5), start, 400, 0, 1, box=(0.0, 1.0))
    assert found.samples.min() >= 0 and found.samples.max() <= 1
    moved = (found.samples[:, 1:] != found.samples[:, :-1]).any(-1).sum(1)
    assert ((found.outside + moved - 400).abs() <= 1).all(), "a flat density accepts all that stays inside"
    assert float(found.samples.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(found.samples.var()) == pytest.approx(1 / 12, rel=0.1)


def test_a_start_that_is_not_finite_names_its_chain():
    start = torch.zeros(3, 2)
    start[1, 0] = float("nan")
    with pytest.raises(DataError, match="^chain 11 starts at a value that is not finite"):
        run(Walk(score, SIGMA), start, 5, names=[10, 11, 12])


@pytest.mark.parametrize(("kind", "what"), [("random_walk", "energy"), ("mala", "energy"), ("langevin", "state")])
def test_an_energy_that_is_not_finite_names_chain_and_step(kind, what):
    calls = []

    def breaking(x):
        calls.append(len(x))
        answer = -x.clone()
        if len(calls) >= (4 if kind == "langevin" else 3):
            answer[-1] = float("inf") if kind == "langevin" else float("nan")
        return answer

    step = {"random_walk": 3, "mala": 1, "langevin": 4}[kind]
    with pytest.raises(DataError, match=f"^{what} of chain 2 is not finite at step {step}: "):
        run(Walk(breaking, 0.5, kind, step=0.01), torch.zeros(3, 2), 5)


def test_a_box_without_a_start_says_where_the_starts_are():
    with pytest.raises(DataError, match=r"^box \[0, 1\] excludes all 3 starts, which are in -2..5: widen it$"):
        run(Walk(score, SIGMA), torch.tensor([[-2.0, 0.5], [5.0, 0.5], [0.5, 3.0]]), 5, box=(0.0, 1.0))


# ---- effective sample size
@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9, -0.4])
def test_effective_samples_of_an_autoregression_are_the_closed_number(memory):
    """x' = φx + ξ: n(1−φ)/(1+φ) independent draws."""
    draws, count, length = torch.Generator().manual_seed(0), 20, 4000
    noise = torch.randn(count, length, 1, generator=draws, dtype=torch.double)
    found = torch.zeros_like(noise)
    found[:, 0] = noise[:, 0] / math.sqrt(1 - memory**2)
    for t in range(1, length):
        found[:, t] = memory * found[:, t - 1] + noise[:, t]
    expected = length * (1 - memory) / (1 + memory)
    assert float(effective_samples(found)) == pytest.approx(count * expected, rel=0.1)
    assert float(effective_of_each(found).mean()) == pytest.approx(expected, rel=0.15)


def test_chains_that_disagree_are_worth_little_together():
    draws = torch.randn(4, 1000, 1, generator=torch.Generator().manual_seed(0))
    apart = draws + 10 * torch.arange(4.0)[:, None, None]
    assert float(effective_samples(draws)) > 3000 and float(effective_samples(apart)) < 40


def test_coordinates_that_never_move_count_one_draw_and_are_left_out_of_the_least():
    draws = torch.randn(2, 500, 3, generator=torch.Generator().manual_seed(0))
    draws[..., 1] = 7.0
    draws[1] = 7.0
    assert float(effective_samples(draws[:1])[1]) == 1
    each = effective_of_each(draws)
    assert each[0] > 300 and each[1] == 1
    assert torch.isnan(effective_samples(draws[:, :3])).all()
