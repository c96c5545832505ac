"""Position Prediction as an Effective Pretraining Strategy (MP3; Zhai et al., ICML 2022) as a Quire plugin."""

from __future__ import annotations

from collections.abc import Callable

from quire.hooks import hookimpl

QUIRE_API = 1


@hookimpl
def quire_components(register: Callable) -> None:
    """Objective, head, metrics and callbacks."""
    register("quire_mp3.objective.PositionPrediction", "objective")
    register("quire_mp3.modules.PositionHead", "decoder", "PositionHead")
    register("quire_mp3.metrics.PositionAccuracy", "metric")
    register("quire_mp3.metrics.GridDistance", "metric")
    register("quire_mp3.callbacks.AttachPositions", "callback")
    register("quire_mp3.callbacks.PutBackPictures", "callback")


@hookimpl
def quire_claims(register: Callable) -> None:
    """The paper's claim, scaled down to scikit-learn's digits."""
    register("mp3", "quire_mp3.claim.PretrainingHelps")
