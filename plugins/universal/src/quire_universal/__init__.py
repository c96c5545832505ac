"""Universal Transformers (Dehghani, Gouws, Vinyals, Uszkoreit, Kaiser, ICLR 2019) as a Quire plugin."""

from __future__ import annotations

from collections.abc import Callable

from quire.hooks import hookimpl

QUIRE_API = 1


@hookimpl
def quire_components(register: Callable) -> None:
    """Encoder, decoder, halting, objectives, data, callback and metrics."""
    register("quire_universal.encoder.UniversalEncoder", "encoder", "TokenEncoder")
    register("quire_universal.decoder.UniversalDecoder", "decoder", "StepModel")
    for name in ("ACT", "GlobalACT", "RandomSteps"):
        register(f"quire_universal.halting.{name}", "part", "halting")
    register("quire_universal.objective.UniversalSeq2Seq", "objective")
    register("quire_universal.objective.UniversalLM", "objective")
    register("quire_universal.facts.Facts", "data")
    register("quire_universal.monitor.PonderMonitor", "callback")
    for name in ("CharAccuracy", "SequenceAccuracy", "PonderTime"):
        register(f"quire_universal.metrics.{name}", "metric")


@hookimpl
def quire_claims(register: Callable) -> None:
    """The claim of the paper, scaled down to strings of digits."""
    register("universal", "quire_universal.claim.UniversalClaim")
