"""Discrete Key-Value Bottleneck (Träuble et al., ICML 2023, arXiv 2207.11240) as a Quire plugin."""

from __future__ import annotations

from collections.abc import Callable

from quire.hooks import hookimpl

QUIRE_API = 1


@hookimpl
def quire_components(register: Callable) -> None:
    """The bottleneck and its decoders, key initialisation, baselines, the class stream, its metrics and picture."""
    register("quire_dkvb.encoder.KeyValueBottleneck", "encoder")
    for path in ("decoders.CodebookVote", "decoders.ConcatProbe", "baselines.NearestMean"):
        register(f"quire_dkvb.{path}", "decoder", "Classifier")
    register("quire_dkvb.baselines.NearestNeighbours", "decoder", "Classifier")
    register("quire_dkvb.keys.KeyInit", "callback")
    register("quire_dkvb.pictures.StreamPicture", "callback")
    register("quire_dkvb.stream.ClassIncremental", "data")
    register("quire_dkvb.toy.ToyGaussians", "data")
    for name in ("FinalAccuracy", "Forgetting", "FirstMinusLast", "BackwardTransfer"):
        register(f"quire_dkvb.metrics.{name}", "metric")
    for name in ("KeyUtilisation", "KeyPerplexity"):
        register(f"quire_dkvb.metrics.{name}", "metric")


@hookimpl
def quire_claims(register: Callable) -> None:
    """The paper's claim, scaled down to scikit-learn's digits."""
    register("dkvb", "quire_dkvb.claim.BottleneckClaim")
