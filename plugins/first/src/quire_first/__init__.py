"""FiRST: Finetuning Router-Selective Transformers (Jain, Sharma, Mukherjee, Pal, 2024), reconstructed for Quire."""

from __future__ import annotations

from collections.abc import Callable

from quire.hooks import hookimpl

QUIRE_API = 1


@hookimpl
def quire_components(register: Callable) -> None:
    """The wrapper, its two training phases, their schedule, and what was skipped."""
    register("quire_first.model.RoutedModel", "decoder", "StepModel")
    register("quire_first.objective.RouterTraining", "objective")
    register("quire_first.objective.RoutedLoRA", "objective")
    register("quire_first.phases.RouterPhases", "callback")
    register("quire_first.metrics.LayersUsed", "metric")


@hookimpl
def quire_claims(register: Callable) -> None:
    """The claim of the paper's abstract, scaled down to strings of digits."""
    register("first", "quire_first.claim.FirstClaim")
