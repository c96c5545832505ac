"""``quire reproduce dae-score``: is a denoiser the score of p_σ, and do chains on it sample p_σ?"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import seed_everything
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import grid_sample

from quire.model import Model
from quire.reproduce import Band, Claim, Results, arm_trainer, mean, quiet
from quire.schedule import WarmupCosine
from quire_dae_score import closed_form
from quire_dae_score.callbacks import ScorePictures
from quire_dae_score.chain_metrics import mmd
from quire_dae_score.chains import Walk, run
from quire_dae_score.densities import GRID, Density, Planar
from quire_dae_score.energy import Score, energy_difference
from quire_dae_score.modules import ScoreMlp
from quire_dae_score.objective import Denoising
from quire_dae_score.toy import ToyDensity

DENSITIES = {"mixture": 1.5, "ring": 0.6, "ninja_star": 0.6}
"""Density → step of the random walk."""
SIGMAS = (0.05, 0.1, 0.2, 0.4)
THEORY = "closed form"
STEPS, QUICK_STEPS = 2000, 300
JUDGED = ("mixture", "ring")


def arm_of(density: str, sigma: float) -> str:
    """The name of an arm."""
    return f"{density} {sigma:g}"


class DenoiserIsScore(Claim):
    """Alain and Bengio 2012 where the truth is known: closed forms, then a small network on three densities.

    The controls: the score of the exact p_σ in the learnt one's place, first-order energies, unadjusted Langevin, the
    reconstruction error as an energy, and the MMD of two sets of true draws.
    """

    paper = (
        "What Regularized Auto-Encoders Learn from the Data Generating Distribution, Guillaume Alain, Yoshua Bengio, "
        "arXiv 1211.4246, 2012; JMLR 15, 2014"
    )
    statement = (
        "a denoiser trained at σ gives the score of p_σ; Metropolis-Hastings with its path energy samples p_σ; the "
        "reconstruction error is no energy"
    )
    budget = (
        f"20000 points of each density, MLP 2-128-128-2 (SiLU, residual), {STEPS} Adam steps of 512, 200 chains of 400 "
        "moves; score error on a grid weighted by the density, energies from the densest draw to 1000 points of the "
        "grid in the box of the draws"
    )
    arms: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **{arm_of(d, s): {"density": d, "sigma": s} for d in DENSITIES for s in SIGMAS},
        THEORY: {},
    }
    seeds = 3
    quick_seeds = 1
    headline = "score error"

    def run(self, arm: str, settings: Mapping[str, Any], seed: int, quick: bool, folder: Path) -> dict[str, float]:
        """Measure one arm: theory, or one density at one σ."""
        if arm == THEORY:
            return closed_form.measure(seed, quick)
        with quiet():
            seed_everything(seed, verbose=False)
            sigma = settings["sigma"]
            data = ToyDensity(settings["density"], seed=seed, batch_size=512)
            model = Model(
                encoder=ScoreMlp((128, 128)),
                objective=Denoising(sigma, "vector"),
                optimizer=functools.partial(torch.optim.Adam, lr=2e-3),
                schedule=WarmupCosine(),
            )
            pictures = [] if quick else [ScorePictures(path=str(folder))]
            steps = QUICK_STEPS if quick else STEPS
            arm_trainer(max_steps=steps, callbacks=pictures, default_root_dir=str(folder)).fit(model, datamodule=data)
            model.eval()

            def score(x: Tensor) -> Tensor:
                return model.objective.score(model, x.float(), sigma).to(x.dtype)

            with torch.no_grad():
                return measure(data.density, score, sigma, DENSITIES[settings["density"]], seed, quick)

    def bands(self, results: Results) -> list[Band]:
        """Theory within its tolerances; energies that rank as −log p_σ does; a score error with a best σ."""
        found = []
        for name, wanted in closed_form.EXPECTED.items():
            value = mean(results, THEORY, name)
            found.append(Band(name, value, str(wanted), wanted.met(value)))
        for density in DENSITIES:
            errors = {s: mean(results, arm_of(density, s), "score error") for s in SIGMAS}
            best, worst = min(errors, key=errors.__getitem__), max(errors, key=errors.__getitem__)
            said = f"{density}: score error at the best σ={best:g} ({errors[best]:.3f}) over the worst σ={worst:g} "
            quotient = errors[best] / errors[worst]
            found.append(Band(f"{said}({errors[worst]:.3f})", quotient, "< 0.5", quotient < 0.5))
            if density in JUDGED:
                rank, other = (mean(results, arm_of(density, best), m) for m in ("Spearman", "Spearman of ‖r−x‖"))
                said = f"{density}, σ={best:g}: Spearman of path energy with −log p_σ (of ‖r−x‖: {other:.3f})"
                found.append(Band(said, rank, "> 0.9 and above ‖r−x‖'s + 0.05", rank > max(0.9, other + 0.05)))
        return found

    def remarks(self, results: Results) -> list[str]:
        """Where no band judges: chains beside their controls, and the mass of separated modes."""
        said = []
        for density in DENSITIES:
            names = ("MMD", "MMD exact score", "MMD first order", "MMD Langevin", "MMD of true draws")
            row = [
                f"σ={s:g} " + " / ".join(f"{mean(results, arm_of(density, s), n):.4f}" for n in names) for s in SIGMAS
            ]
            said.append(
                f"{density}: MMD² learnt / exact score / first order / Langevin / true draws: " + "; ".join(row)
            )
        masses = [f"σ={s:g} {mean(results, arm_of('mixture', s), 'mass of x>0'):.3f}" for s in SIGMAS]
        said.append(
            "mixture: share of states in the right mode (0.7 is true): " + "; ".join(masses) + ". A wrong mass between "
            "separated modes at small σ is expected: the score between them is not learnt"
        )
        said.append(
            "which sampler is better is not claimed; images and the paper's own experiments are not tested here"
        )
        return said


# ---- measures
def measure(density: Density, score: Score, sigma: float, step: float, seed: int, quick: bool) -> dict[str, float]:
    """A learnt score against the truth: on a grid, its energies, its chains and their controls."""
    draws = torch.Generator().manual_seed(1000 + seed)
    points, level, true = on_grid(density, sigma)
    learnt = score(points.float()).double()
    said = {
        "score error": weighted_error(learnt, density.score(points), density.log_prob(points).exp()),
        "error to p_σ": weighted_error(learnt, true, level.exp()),
    }
    seen = noised(density, 1000, sigma, draws)
    inside = ((points >= seen.amin(0)) & (points <= seen.amax(0))).all(1).nonzero()[:, 0]
    chosen = inside[torch.randperm(len(inside), generator=draws)[:1000]]
    y, true_energy = points[chosen], -level[chosen]
    anchor = seen[density.log_prob(seen, sigma).argmax()].double().expand_as(y)
    energy, _ = energy_difference(score, anchor, y, sigma)
    said["Spearman"] = float(spearmanr(energy.numpy(), true_energy.numpy()).statistic)
    residue = score(y).norm(dim=1)
    said["Spearman of ‖r−x‖"] = float(spearmanr(residue.numpy(), true_energy.numpy()).statistic)

    chains, steps = (100, 120) if quick else (200, 400)
    start, truth = density.sample(chains, draws), noised(density, 1000, sigma, draws)
    walks = {
        "MMD": Walk(score, sigma, step=step),
        "MMD exact score": Walk(exact_score(density, sigma), sigma, step=step),
        "MMD first order": Walk(score, sigma, step=step, quadrature="first"),
        "MMD Langevin": Walk(score, sigma, "langevin"),
    }
    for name, walk in walks.items():
        found = run(walk, start, steps, steps // 2, 10, generator=draws)
        said[name] = float(mmd(found.samples.flatten(0, 1), truth))
        if name == "MMD":
            said["acceptance"] = float(found.accepted.mean())
            said["mass of x>0"] = float((found.samples[..., 0] > 0).double().mean())
    said["MMD of true draws"] = float(mmd(noised(density, 1000, sigma, draws), truth))
    return said


def noised(density: Density, count: int, sigma: float, draws: torch.Generator) -> Tensor:
    """Draws of p_σ."""
    return density.sample(count, draws) + sigma * torch.randn(count, density.width, generator=draws)


def weighted_error(found: Tensor, true: Tensor, weight: Tensor) -> float:
    """√(Σw‖s − t‖²/Σw‖t‖²)."""
    above, below = ((weight * v.square().sum(1)).sum() for v in (found - true, true))
    return float((above / below).sqrt())


def on_grid(density: Density, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Points of a grid [120²,2], log p_σ there, and its gradient."""
    cell = 2 * density.half / GRID
    axis = ((torch.arange(GRID, dtype=torch.double) + 0.5) * cell - density.half)[1::3]
    points = torch.cartesian_prod(axis, axis)
    if isinstance(density, Planar):
        level, slope = density.table(sigma)
        return points, level[1::3, 1::3].flatten(), slope[:, 1::3, 1::3].flatten(1).T
    return points, density.log_prob(points, sigma), density.score(points, sigma)


def exact_score(density: Density, sigma: float) -> Score:
    """∇log p_σ as a function: closed form, or read off a table between whose nodes it is interpolated."""
    if not isinstance(density, Planar):
        return lambda x: density.score(x, sigma).to(x.dtype)
    table = density.table(sigma)[1].transpose(1, 2)[None]  # grid_sample reads the last axis by the first coordinate
    reach = density.half * (1 - 1 / GRID)

    def score(x: Tensor) -> Tensor:
        place = (x.double() / reach)[None, None]
        found = grid_sample(table, place, padding_mode="border", align_corners=True)
        return found[0, :, 0].T.to(x.dtype)

    return score
