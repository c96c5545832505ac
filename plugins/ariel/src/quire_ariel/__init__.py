"""AriEL: volume codes of sentences over a language model (Celotti, Brodeur, Rouat, 2020) as a Quire plugin."""

from __future__ import annotations

from collections.abc import Callable

from quire.hooks import hookimpl

QUIRE_API = 1


@hookimpl
def quire_components(register: Callable) -> None:
    """The code's two sides, its sampler, language models, the controls, the grammar and its measures."""
    register("quire_ariel.decoder.VolumeDecoder", "decoder", ("StepModel", "VolumeDecoder"))
    register("quire_ariel.encoder.VolumeEncoder", "encoder", "VectorEncoder")
    register("quire_ariel.sampler.UniformCube", "sampler")
    for name in ("GRULanguageModel", "LSTMLanguageModel"):
        register(f"quire_ariel.recurrent.{name}", "decoder", "StepModel")
    register("quire_ariel.sentence.SentenceEncoder", "encoder", "VectorEncoder")
    register("quire_ariel.objective.TextAutoencoding", "objective")
    register("quire_ariel.data.QuestionGrammar", "data")
    register("quire_ariel.data.ScanCommands", "data")
    register("quire_ariel.data.ClosedWords", "part", "tokenizer")
    for name in ("GrammarValidity", "Uniqueness", "GrammarCoverage", "VocabularyCoverage", "ReconstructionExact"):
        register(f"quire_ariel.metrics.{name}", "metric")
    register("quire_ariel.callbacks.LatentSampleReport", "callback")


@hookimpl
def quire_claims(register: Callable) -> None:
    """The claim, scaled down to questions of a small grammar."""
    register("ariel", "quire_ariel.claim.ArielClaim")
