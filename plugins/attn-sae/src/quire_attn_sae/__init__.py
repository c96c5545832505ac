"""Interpreting Attention Layer Outputs with Sparse Autoencoders (Kissane, Krzyzanowski et al., 2024) for Quire."""

from __future__ import annotations

from collections.abc import Callable

from quire.hooks import hookimpl

QUIRE_API = 1


@hookimpl
def quire_components(register: Callable) -> None:
    """Heads and sources of a latent, interventions, a rule to judge it by, the paper's schedule."""
    register("quire_attn_sae.heads.HeadAttribution", "metric")
    register("quire_attn_sae.attribution.DirectFeatureAttribution", "sampler")
    register("quire_attn_sae.intervention.LatentIntervention", "sampler")
    register("quire_attn_sae.rules.ProxyRule", "metric")
    register("quire_attn_sae.schedule.CosineWarmupRewarm", "part", "schedule")


@hookimpl
def quire_claims(register: Callable) -> None:
    """Recovered loss at few active latents, and latents of an induction head, on small models."""
    register("attn-sae", "quire_attn_sae.claim.AttentionClaim")
