"""Superposed Decoding (Shen, Fan, Pratt, Park, Wallingford, Kakade, Holtzman, Krishna, Farhadi, Kusupati, 2024)."""

from __future__ import annotations

from collections.abc import Callable

from quire.hooks import hookimpl

QUIRE_API = 1


@hookimpl
def quire_components(register: Callable) -> None:
    """Sampler, metric of its drafts, and a callback that shows them while training."""
    register("quire_superposed.sampler.Superposed", "sampler")
    register("quire_superposed.metrics.DraftSet", "metric")
    register("quire_superposed.callbacks.PreviewDrafts", "callback")


@hookimpl
def quire_commands(register: Callable) -> None:
    """Counting n-grams ahead of decoding."""
    register(
        "ngrams", "quire_superposed.command.main", "count a data module's n-grams into a file, or merge such files"
    )


@hookimpl
def quire_claims(register: Callable) -> None:
    """The paper's claim on a small model of Python's own documentation and source."""
    register("superposed", "quire_superposed.claim.SuperposedClaim")
