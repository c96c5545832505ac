"""Deep Learning for Case-Based Reasoning through Prototypes (Li, Liu, Chen, Rudin, AAAI 2018) as a Quire plugin."""

from __future__ import annotations

from collections.abc import Callable

from quire.hooks import hookimpl

QUIRE_API = 1


@hookimpl
def quire_components(register: Callable) -> None:
    """Layer, objective, sampler, callbacks, transform and metrics."""
    register("quire_prototypes.modules.PrototypeLayer", "decoder", ("Classifier", "PixelDecoder"))
    register("quire_prototypes.objective.CaseBasedReasoning", "objective")
    register("quire_prototypes.sampler.ExplainByPrototypes", "sampler")
    register("quire_prototypes.callbacks.PrototypeImages", "callback")
    register("quire_prototypes.callbacks.PushPrototypes", "callback")
    register("quire_prototypes.transforms.ElasticDeformation", "part", "transform")
    for name in ("R1Full", "R2Full", "PrototypeClassCoverage", "PrototypesUsed", "PrototypePixelDistance"):
        register(f"quire_prototypes.metrics.{name}", "metric")


@hookimpl
def quire_claims(register: Callable) -> None:
    """The claim of the paper, scaled down to scikit-learn's digits."""
    register("prototypes", "quire_prototypes.claim.PrototypesClaim")
