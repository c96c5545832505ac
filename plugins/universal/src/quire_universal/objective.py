"""Cross-entropy and the cost of thinking. Dehghani et al. 2018; the ponder term is Graves 2016's."""

from __future__ import annotations

from typing import Any

from quire.contracts import Batch, Losses, Objective
from quire.errors import ConfigError
from quire.roles.language.next_token import score, scored
from quire_universal.decoder import UniversalDecoder
from quire_universal.encoder import PonderedTokens, UniversalEncoder
from quire_universal.halting import Ponder


class _Pondering(Objective):
    """Cross-entropy plus ``ponder`` times the mean of steps and remainder over real positions, each side apart."""

    def __init__(self, ponder: float = 0.01, smoothing: float = 0.1) -> None:
        super().__init__()
        name = type(self).__name__
        if ponder < 0:
            raise ConfigError(f"{name}.ponder must be at least 0, got {ponder}")
        if not 0 <= smoothing < 1:
            raise ConfigError(f"{name}.smoothing must be in [0, 1), got {smoothing}")
        self.ponder, self.smoothing = ponder, smoothing
        self.weights = {"ponder_encoder": ponder, "ponder_decoder": ponder}

    def _with(self, losses: Losses, **sides: Ponder | None) -> Losses:
        for side, ponder in sides.items():
            if ponder is not None:
                losses[f"ponder_{side}"] = ponder.mean()
                losses.metrics[f"steps_{side}"] = ponder.mean(ponder.steps).detach()
                losses.outputs[f"ponder_{side}"] = Ponder(ponder.cost.detach(), ponder.steps, ponder.mask)
        return losses


class UniversalSeq2Seq(_Pondering):
    """Target tokens behind a source, teacher forced, and what both sides' steps cost. Dehghani et al. 2018.

    Args:
        ponder: Weight of the mean of steps plus remainder over real positions, encoder and decoder apart.
        smoothing: Label smoothing, in [0, 1).

    Needs:
        encoder: UniversalEncoder. decoder: UniversalDecoder.

    Returns:
        ``seq2seq``: mean over real target tokens, in nats. ``ponder_encoder``, ``ponder_decoder``: in steps, where
        that side halts.

    Raises:
        ConfigError: ``ponder`` below 0, ``smoothing`` outside [0, 1).
    """

    encoder: UniversalEncoder
    decoder: UniversalDecoder
    fields = ("source", "tokens")

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Reverse three digits with ACT on both sides."""
        return tiny_seq2seq({"class_path": "ACT", "init_args": {"max_steps": 3, "bias": -0.5}})

    def forward(self, model: Any, batch: Batch) -> Losses:
        """Score the batch's targets."""
        encoder, decoder = model.encoder.role(UniversalEncoder), model.decoder.role(UniversalDecoder)
        tokens, mask = batch["tokens"], batch.get("mask")
        codes: PonderedTokens = encoder(batch)
        logits, ponder = decoder.pondered(codes, tokens[:, :-1], None if mask is None else mask[:, :-1])
        losses = score(logits, tokens, scored(batch, True), self.smoothing, False, "seq2seq")
        before = None if codes.ponder is None else Ponder(codes.ponder, codes.steps, codes.mask)
        return self._with(losses, encoder=before, decoder=ponder)


class UniversalLM(_Pondering):
    """The next token, and what the steps cost. Dehghani et al. 2018.

    Args:
        ponder: Weight of the mean of steps plus remainder over real positions.
        smoothing: Label smoothing, in [0, 1).

    Needs:
        decoder: UniversalDecoder, with no encoder.

    Returns:
        ``next``: mean over real target tokens behind the prompt, in nats. ``ponder_decoder``: in steps, with halting.

    Raises:
        ConfigError: ``ponder`` below 0, ``smoothing`` outside [0, 1).
    """

    decoder: UniversalDecoder
    fields = ("tokens",)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small language model on the standard library's text."""
        return tiny_lm({"class_path": "ACT", "init_args": {"max_steps": 3, "bias": -0.5}})

    def forward(self, model: Any, batch: Batch) -> Losses:
        """Score the batch's tokens."""
        tokens, mask = batch["tokens"], batch.get("mask")
        decoder = model.decoder.role(UniversalDecoder)
        logits, ponder = decoder.pondered(None, tokens[:, :-1], None if mask is None else mask[:, :-1])
        losses = score(logits, tokens, scored(batch, False), self.smoothing, False, "next")
        return self._with(losses, decoder=ponder)


def tiny_seq2seq(halting: Any = None, data: dict[str, Any] | None = None, **model: Any) -> dict[str, Any]:
    """Reverse three digits with a small encoder and decoder."""
    shape = {"width": 16, "heads": 2, "ffn": 32, "steps": 2, "dropout": 0.0, "halting": halting}
    small = {"task": "reverse", "train_length": 3, "test_length": 3, "samples": 64, "batch_size": 16}
    return {
        "model": {
            "encoder": {"class_path": "UniversalEncoder", "init_args": dict(shape)},
            "decoder": {"class_path": "UniversalDecoder", "init_args": dict(shape)},
            "objective": "UniversalSeq2Seq",
            "sampler": {"class_path": "Greedy", "init_args": {"max_new_tokens": 5}},
            **model,
        },
        "data": data or {"class_path": "Algorithmic", "init_args": small},
    }


def tiny_lm(halting: Any = None) -> dict[str, Any]:
    """A small language model on the standard library's text."""
    shape = {"width": 16, "heads": 2, "ffn": 32, "steps": 2, "dropout": 0.0, "halting": halting}
    text = {"source": "stdlib:docs", "length": 32, "batch_size": 8, "train_samples": 64}
    return {
        "model": {
            "decoder": {"class_path": "UniversalDecoder", "init_args": shape},
            "objective": "UniversalLM",
            "sampler": {"class_path": "Greedy", "init_args": {"max_new_tokens": 8}},
        },
        "data": {"class_path": "TextTokens", "init_args": text},
    }
