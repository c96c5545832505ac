"""What Regularized Auto-Encoders Learn from the Data Generating Distribution (Alain, Bengio 2012) as a Quire plugin."""

from __future__ import annotations

from collections.abc import Callable

from quire.hooks import hookimpl

QUIRE_API = 1


@hookimpl
def quire_components(register: Callable) -> None:
    """Objectives, sampler, network, toy densities, latent field, metrics, pictures."""
    register("quire_dae_score.objective.Denoising", "objective", "GaussianDenoiser")
    register("quire_dae_score.objective.Contractive", "objective", "GaussianDenoiser")
    register("quire_dae_score.sampler.MetropolisHastings", "sampler")
    register("quire_dae_score.modules.ScoreMlp", "encoder", "VectorEncoder")
    register("quire_dae_score.latent.LatentField", "part", "transform")
    register("quire_dae_score.toy.ToyDensity", "data")
    for name in ("ScoreError", "EnergyError", "JacobianAsymmetry"):
        register(f"quire_dae_score.metrics.{name}", "metric")
    for name in ("GridKL", "MMD", "EffectiveSamples", "NearestTraining", "ClassCoverage"):
        register(f"quire_dae_score.chain_metrics.{name}", "metric")
    register("quire_dae_score.callbacks.ScorePictures", "callback")


@hookimpl
def quire_claims(register: Callable) -> None:
    """The paper's claim on densities that are known."""
    register("dae-score", "quire_dae_score.claim.DenoiserIsScore")
