"""Chains on a learnt score: in a batch and one at a time; and three ways to a Jacobian's norm, by cost and spread."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from tests.benchmarks.clock import milliseconds, one_thread, race, ratio, table

CHAINS, STEPS, ROWS, PROBES = 64, 40, 64, (1, 4, 16)


def model_of(width: int) -> Any:
    """A built denoiser of vectors, untrained: speed doesn't depend on what is learnt."""
    from quire.model import Model
    from quire_dae_score.modules import ScoreMlp
    from quire_dae_score.objective import Denoising

    torch.manual_seed(0)
    model = Model(encoder=ScoreMlp((128, 128)), objective=Denoising(0.2, "vector"), spec={"width": width})
    model.configure_model()
    return model.eval()


def chains() -> list[list[str]]:
    """Chains a CPU-second of each kind."""
    from quire_dae_score.chains import Walk, run

    rows = [["kind", f"{CHAINS} in a batch, chains/CPU-s", "one at a time", "gain"]]
    model = model_of(2)
    start = torch.randn(CHAINS, 2, generator=torch.Generator().manual_seed(0))
    for kind in ("random_walk", "mala", "langevin", "alternate"):
        walk = Walk(lambda x: model.objective.score(model, x, 0.2), 0.2, kind, step=0.2)
        arms = {
            "batch": lambda w=walk: run(w, start, STEPS),
            "single": lambda w=walk: [run(w, start[i : i + 1], STEPS) for i in range(8)],
        }
        spent = race(arms, repeats=5, warmup=1)
        speed = {"batch": CHAINS, "single": 8}
        per = {arm: [t / speed[arm] for t in times] for arm, times in spent.items()}
        shown = [f"{1 / median(per[arm]):.1f} ({1 / min(per[arm]):.1f})" for arm in arms]
        rows.append([kind, *shown, ratio(per["single"], per["batch"])])
    return rows


def jacobians() -> list[list[str]]:
    """Cost of a batch with the gradient of its penalty, and the relative spread of one row's estimate."""
    from quire_dae_score.jacobian import difference_norm, exact_norm, hutchinson_norm

    rows = [["D", "norm", "probes", f"{ROWS} rows with gradient, CPU-ms", "against exact", "spread of a row"]]
    for width in (2, 16, 64):
        model = model_of(width)

        def function(x: torch.Tensor, m: Any = model) -> torch.Tensor:
            return m.objective.restore(m, {"vector": x}, 0.2)

        x = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(0))
        norms = {("exact", "-"): lambda f=function, x=x: exact_norm(f, x)}
        for probes in PROBES:
            norms["hutchinson", str(probes)] = lambda f=function, x=x, p=probes: hutchinson_norm(f, x, p)
            norms["difference", str(probes)] = lambda f=function, x=x, p=probes: difference_norm(f, x, p, 0.02)
        spent = race({str(k): lambda n=n: n().mean().backward() for k, n in norms.items()}, repeats=7, warmup=2)
        with torch.no_grad():
            true = exact_norm(function, x)
            for (name, probes), norm in norms.items():
                times = spent[str((name, probes))]
                draws = torch.stack([norm() for _ in range(1 if name == "exact" else 100)])
                spread = (draws - true).square().mean(0).sqrt() / true
                cost = ratio(times, spent[str(("exact", "-"))])
                rows.append([str(width), name, probes, milliseconds(times), cost, f"{float(spread.mean()):.4f}"])
    return rows


def main() -> None:
    """Print both tables."""
    with one_thread():
        table(f"dae-score: {STEPS} moves of each chain, MLP 2-128-128-2, scaled quadrature", chains())
        table("dae-score: the norm of the reconstruction's Jacobian, MLP D-128-128-D, untrained", jacobians())
