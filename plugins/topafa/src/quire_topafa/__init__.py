"""Evaluating and Designing Sparse Autoencoders by Approximating Quasi-Orthogonality (Lee et al., 2025) for Quire."""

from __future__ import annotations

from collections.abc import Callable

from quire.hooks import hookimpl

QUIRE_API = 1


@hookimpl
def quire_components(register: Callable) -> None:
    """The selector without a k, its loss term, the label-free metric and its plot."""
    register("quire_topafa.selector.TopAFA", "part", "selector")
    register("quire_topafa.loss.AFALoss", "objective")
    register("quire_topafa.metric.EpsLBO", "metric")
    register("quire_topafa.plot.ZFPlot", "callback")


@hookimpl
def quire_claims(register: Callable) -> None:
    """Reconstruction without choosing k, against TopK at the same L0, at two lengths of training."""
    register("topafa", "quire_topafa.claim.TopAfaClaim")
