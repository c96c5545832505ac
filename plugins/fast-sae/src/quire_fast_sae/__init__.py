"""Training Superior Sparse Autoencoders for Instruct Models (Li, Ye et al., 2025) for Quire."""

from __future__ import annotations

from collections.abc import Callable

from quire.hooks import hookimpl

QUIRE_API = 1


@hookimpl
def quire_components(register: Callable) -> None:
    """The feed and its control, what they read, errors on special tokens, steering, the paper's schedule."""
    register("quire_fast_sae.instances.InstructActivations", "data")
    register("quire_fast_sae.blocks.BlockActivations", "data")
    register("quire_fast_sae.chats.ChatText", "data")
    register("quire_fast_sae.metrics.SequenceMSE", "metric")
    register("quire_fast_sae.metrics.SpecialTokenMSE", "metric")
    register("quire_fast_sae.steer.Steer", "sampler")
    register("quire_fast_sae.tokenizer.ChatBytes", "part", "tokenizer")
    register("quire_fast_sae.schedule.HoldThenCosine", "part", "schedule")


@hookimpl
def quire_claims(register: Callable) -> None:
    """The paper's three ways to feed a dictionary, scaled down to a byte model of chat."""
    register("fast-sae", "quire_fast_sae.claim.FastClaim")
