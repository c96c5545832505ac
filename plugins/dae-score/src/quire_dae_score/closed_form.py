"""The claim's first part: what theory says in closed form, and what this code measures. No network is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad

from quire_dae_score.chains import Walk, run
from quire_dae_score.densities import Mixture, gaussian
from quire_dae_score.energy import energy_difference
from quire_dae_score.jacobian import asymmetry, difference_norm, exact, exact_norm, hutchinson_norm
from quire_dae_score.mixing import effective_samples

SIGMA = 0.5
EYE = torch.eye(2, dtype=torch.double)
MODES = Mixture([[-2.0], [2.0]], [[0.25]], [0.3, 0.7])
CLEAN = {1.0: 0.630, 0.3: 0.136, 0.1: 0.0172, 0.03: 0.00158, 0.01: 1.75e-4}
"""σ → relative error of the score of p_σ as the score of p, for the Gaussian."""


class Expected(NamedTuple):
    """What a measure should be: within ``tolerance`` of ``value``; or, with ``above``, larger than ``value``."""

    value: float
    tolerance: float = 0.0
    above: bool = False

    def met(self, measured: float) -> bool:
        """Whether it is."""
        return measured > self.value if self.above else abs(measured - self.value) <= self.tolerance

    def __str__(self) -> str:
        return f"> {self.value:g}" if self.above else f"{self.value:.6g} ± {self.tolerance:.2g}"


EXPECTED: dict[str, Expected] = {
    "A*: largest error of least squares": Expected(0, 0.003),
    "A*: minimum loss": Expected(0.39931, 0.003),
    "(A*−I)/σ² + (S+σ²I)⁻¹": Expected(0, 1e-12),
    **{f"error against the clean score, σ={s:g}": Expected(v, 0.01 * v) for s, v in CLEAN.items()},
    "ΔE, two points": Expected(-0.0880322, 1e-6),
    "ΔE: one, two points and trapezoid differ by": Expected(0, 1e-12),
    "ΔE, first order (control)": Expected(-0.574683, 1e-6),
    "random walk: covariance off by, in errors": Expected(0, 3),
    "MALA: covariance off by, in errors": Expected(0, 3),
    "Langevin: covariance off by, in errors": Expected(0, 3),
    "alternate: covariance off by, in errors": Expected(0, 3),
    "first order (control): variance": Expected(4.17, 0.2),
    "detailed balance off by": Expected(0, 1e-10),
    "detailed balance, first order (control): logs off by": Expected(1.0, above=True),
    "mass of x>0, σ=.5": Expected(0.69906, 0.02),
    "mass of x>0, σ=.2": Expected(0.69996, 0.025),
    "mass of x>0, σ=.2, five points (control)": Expected(0.616, 0.03),
    "Hutchinson over exact norm": Expected(1, 0.02),
    "difference over exact norm": Expected(1, 0.02),
    "conservative: asymmetry": Expected(0, 1e-5),
    "conservative: closed-loop energy": Expected(0, 1e-6),
}


def measure(seed: int, quick: bool) -> dict[str, float]:
    """Every measure of ``EXPECTED`` once."""
    draws = torch.Generator().manual_seed(seed)
    return {
        **_optimum(draws),
        **_energies(),
        **_covariances(draws, quick),
        **_balance(draws),
        **_masses(draws, quick),
    } | (_jacobians(draws))


def _smooth() -> Tensor:
    return gaussian().covariance + SIGMA**2 * EYE


def _score(x: Tensor) -> Tensor:
    return -(x @ torch.linalg.inv(_smooth()).to(x.dtype))


def _optimum(draws: torch.Generator) -> dict[str, float]:
    covariance = gaussian().covariance
    best = covariance @ torch.linalg.inv(_smooth())
    x = torch.randn(200_000, 2, generator=draws, dtype=torch.double) @ torch.linalg.cholesky(covariance).T
    y = x + SIGMA * torch.randn(x.shape, generator=draws, dtype=torch.double)
    found = torch.linalg.lstsq(y, x).solution.T
    said = {
        "A*: largest error of least squares": (found - best).abs().max(),
        "A*: minimum loss": (y @ found.T - x).square().sum(1).mean(),
        "(A*−I)/σ² + (S+σ²I)⁻¹": ((best - EYE) / SIGMA**2 + torch.linalg.inv(_smooth())).abs().max(),
    }
    clean = gaussian().score(EYE)
    for sigma in CLEAN:
        away = gaussian().score(EYE, sigma) - clean
        said[f"error against the clean score, σ={sigma:g}"] = away.norm() / clean.norm()
    return {k: float(v) for k, v in said.items()}


def _energies() -> dict[str, float]:
    x, y = torch.tensor([[0.3, -0.7]], dtype=torch.double), torch.tensor([[1.1, 0.4]], dtype=torch.double)
    found = {q: float(energy_difference(_score, x, y, SIGMA, q)[0]) for q in (1, 2, "trapezoid", "first")}  # type: ignore[arg-type]
    right = [found[q] for q in (1, 2, "trapezoid")]
    return {
        "ΔE, two points": found[2],
        "ΔE: one, two points and trapezoid differ by": max(right) - min(right),
        "ΔE, first order (control)": found["first"],
    }


def _of_eigenvalues(change: Callable[[Tensor], Tensor]) -> Tensor:
    values, vectors = torch.linalg.eigh(gaussian().covariance)
    return vectors @ torch.diag(change(values)) @ vectors.T


def _covariances(draws: torch.Generator, quick: bool) -> dict[str, float]:
    chains, steps = (300, 300) if quick else (1000, 500)
    start = torch.randn(chains, 2, generator=draws, dtype=torch.double) @ torch.linalg.cholesky(_smooth()).T
    square = SIGMA**2
    exact_ones = {
        "random walk": (Walk(_score, SIGMA, step=1.0), _smooth()),
        "MALA": (Walk(_score, SIGMA, "mala"), _smooth()),
        "Langevin": (
            Walk(_score, SIGMA, "langevin"),
            _of_eigenvalues(lambda v: 2 * (v + square) ** 2 / (2 * v + square)),
        ),
        "alternate": (Walk(_score, SIGMA, "alternate"), _of_eigenvalues(lambda v: 2 * v**2 / (2 * v + square))),
    }
    said = {}
    for name, (walk, covariance) in exact_ones.items():
        found = run(walk, start, steps, steps // 5, generator=draws).samples
        products = torch.stack([found[..., i] * found[..., j] for i, j in ((0, 0), (0, 1), (1, 1))], -1)
        error = products.flatten(0, 1).std(0) / effective_samples(products).sqrt()
        true = covariance[[0, 0, 1], [0, 1, 1]]
        off = ((products.mean((0, 1)) - true).abs() / error).max()
        said[f"{name}: covariance off by, in errors"] = float(off)
    local = run(Walk(_score, SIGMA, step=1.0, quadrature="first"), start, steps, steps // 3, generator=draws)
    said["first order (control): variance"] = float(local.samples[..., 0].square().mean())
    return said


def _balance(draws: torch.Generator) -> dict[str, float]:
    x, y = 2 * torch.randn(2, 500, 2, generator=draws, dtype=torch.double)
    target, worst, local = gaussian(), 0.0, 0.0

    def proposal(walk: Walk, a: Tensor, b: Tensor) -> Tensor:
        centre, width = (a, walk.step) if walk.kind == "random_walk" else (walk.centre(a), math.sqrt(2) * SIGMA)
        return torch.distributions.Normal(centre, width).log_prob(b).sum(1)

    for kind in ("random_walk", "mala"):
        for rule in ("scaled", "first"):
            walk = Walk(_score, SIGMA, kind, step=0.7, quadrature=rule)  # type: ignore[arg-type]
            there, back = (
                target.log_prob(a, SIGMA) + proposal(walk, a, b) + walk.log_accept(a, b)[0].clamp(max=0)
                for a, b in ((x, y), (y, x))
            )
            if rule == "scaled":
                worst = max(worst, float((there.exp() - back.exp()).abs().max()))
            else:
                local = max(local, float((there - back).abs().max()))
    return {"detailed balance off by": worst, "detailed balance, first order (control): logs off by": local}


def _masses(draws: torch.Generator, quick: bool) -> dict[str, float]:
    chains, steps = (400, 400) if quick else (1000, 1000)
    said = {}
    for sigma, rule, name in (
        (0.5, "scaled", "mass of x>0, σ=.5"),
        (0.2, "scaled", "mass of x>0, σ=.2"),
        (0.2, 5, "mass of x>0, σ=.2, five points (control)"),
    ):
        start = MODES.sample(chains, draws).double()
        walk = Walk(lambda x, s=sigma: MODES.score(x, s), sigma, step=2.0, quadrature=rule)  # type: ignore[arg-type, misc]
        found = run(walk, start, steps, steps // 4, 5, generator=draws)
        said[name] = float((found.samples > 0).double().mean())
    return said


def _jacobians(draws: torch.Generator) -> dict[str, float]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(1 << 31, (), generator=draws)))
        net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 2)).double().requires_grad_(False)
    x = torch.randn(200, 2, generator=draws, dtype=torch.double)
    true = exact_norm(net, x).mean()

    def slope(at: Tensor) -> Tensor:
        return -grad(lambda z: net(z).square().sum() / 2)(at)

    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [-1.0, 1.0]], dtype=torch.double)
    around = energy_difference(slope, corners, corners.roll(-1, 0), 0.1, 64)[0].sum()
    return {
        "Hutchinson over exact norm": float(hutchinson_norm(net, x, 400, draws).mean() / true),
        "difference over exact norm": float(difference_norm(net, x, 400, 1e-3, draws).mean() / true),
        "conservative: asymmetry": float(asymmetry(exact(slope, x)).max()),
        "conservative: closed-loop energy": float(around.abs()),
    }
