"""Lossless Acceleration for Seq2seq Generation with Aggressive Decoding (Ge, Xia, Sun, Chen, Wei, 2022) for Quire."""

from __future__ import annotations

from collections.abc import Callable

from quire.hooks import hookimpl

QUIRE_API = 1


@hookimpl
def quire_components(register: Callable) -> None:
    """Two drafters, the block drafter's training, the tolerant acceptance rule, and edit scores."""
    register("quire_aggressive.source.SourceCopy", "part", "drafter")
    register("quire_aggressive.block.BlockDrafter", "decoder", "BlockDrafter")
    register("quire_aggressive.objective.BlockPrediction", "objective")
    register("quire_aggressive.accept.Tolerance", "part", "acceptance")
    register("quire_aggressive.metrics.EditScores", "metric")


@hookimpl
def quire_claims(register: Callable) -> None:
    """Input-guided and general aggressive decoding, scaled down."""
    register("aggressive", "quire_aggressive.claim.AggressiveClaim")
