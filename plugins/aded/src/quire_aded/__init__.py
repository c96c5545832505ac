"""Adaptive Draft-Verification for Efficient Large Language Model Decoding (Liu, Lei, Zhang, Xu, 2024) for Quire."""

from __future__ import annotations

from collections.abc import Callable

from quire.hooks import hookimpl

QUIRE_API = 1


@hookimpl
def quire_components(register: Callable) -> None:
    """Drafter, the official code's acceptance rule, and callbacks that keep or forget what was learnt."""
    register("quire_aded.drafter.TrigramTree", "part", "drafter")
    register("quire_aded.accept.SampleTwice", "part", "acceptance")
    register("quire_aded.callbacks.SaveTrigrams", "callback")
    register("quire_aded.callbacks.ForgetTrigrams", "callback")


@hookimpl
def quire_claims(register: Callable) -> None:
    """The mechanism of the paper, scaled down to a small model of code and prose."""
    register("aded", "quire_aded.claim.AdedClaim")
