"""Features that Make a Difference (gradient SAEs; Olmo et al., 2024, arXiv 2411.10397) for Quire."""

from __future__ import annotations

from collections.abc import Callable

from quire.hooks import hookimpl

QUIRE_API = 1


@hookimpl
def quire_components(register: Callable) -> None:
    """Selectors that rank by gradients, the table that parts training from selection, and the effect of steering."""
    register("quire_gsae.selectors.GradTopK", "part", "selector")
    register("quire_gsae.selectors.GradBatchTopK", "part", "selector")
    register("quire_gsae.table.SelectionTable", "callback")
    register("quire_gsae.steering.SteeringEffect", "metric")


@hookimpl
def quire_claims(register: Callable) -> None:
    """The paper's dictionaries on a tiny language model, trained and judged with and without gradients."""
    register("gsae", "quire_gsae.claim.GsaeClaim")
