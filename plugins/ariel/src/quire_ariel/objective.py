"""The controls' objective: say a sentence again from its vector. After the baselines of Celotti et al. 2020."""

from __future__ import annotations

from typing import Any

from quire.contracts import Batch, Losses, Objective
from quire.errors import ConfigError
from quire.roles.language.contract import StepModel
from quire.roles.language.next_token import score, scored
from quire.roles.latent.contract import VectorEncoder
from quire_ariel.sentence import SentenceEncoder, divergence


class TextAutoencoding(Objective):
    """Decode each sentence from its vector, teacher forced; for a VAE also keep the vectors near a normal law.

    The autoencoder, VAE and Transformer controls of Celotti et al. 2020's code.

    Args:
        kl_weight: Weight of a sentence's whole KL against the mean loss of a token; 0 is an autoencoder.
        free_bits: Bits that each dimension of the vector may have at no cost.
        warmup: Share of the training over which the KL's weight rises from 0, in [0, 1].

    Needs:
        encoder: VectorEncoder. decoder: a StepModel that reads the vector: GRULanguageModel, LSTMLanguageModel, or
        Seq2SeqDecoder behind SentenceEncoder. Field: tokens.

    Returns:
        ``reconstruct``: mean over real target tokens, in nats. ``kl``: of a sentence, in nats, times the warm-up.

    Raises:
        ConfigError: an argument out of range, or a ``kl_weight`` for an encoder without a Gaussian.
    """

    encoder: VectorEncoder
    decoder: StepModel
    fields = ("tokens",)

    def __init__(self, kl_weight: float = 0.0, free_bits: float = 0.0, warmup: float = 0.5) -> None:
        super().__init__()
        if kl_weight < 0 or free_bits < 0 or not 0 <= warmup <= 1:
            raise ConfigError(
                "TextAutoencoding needs kl_weight >= 0, free_bits >= 0 and warmup in [0, 1];"
                f" got {kl_weight}, {free_bits} and {warmup}"
            )
        self.free_bits, self.warmup = free_bits, warmup
        self.weights = {"kl": kl_weight}

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small VAE of questions."""
        from quire_ariel.sentence import tiny_autoencoder

        return tiny_autoencoder()

    def check(self, model: Any) -> None:
        """A KL needs a Gaussian."""
        found = model.encoder.role(SentenceEncoder)
        if self.weights["kl"] and not getattr(found, "variational", False):
            raise ConfigError("TextAutoencoding.kl_weight needs a SentenceEncoder with variational=true: set it to 0")

    def forward(self, model: Any, batch: Batch) -> Losses:
        """Score the batch's sentences."""
        codes, mask = model.encoder(batch), batch.get("mask")
        tokens = batch["tokens"]
        logits = model.decoder.role(StepModel)(codes, tokens[:, :-1], None if mask is None else mask[:, :-1])
        losses = score(logits, tokens, scored(batch, True), 0.0, False, "reconstruct")
        if getattr(codes, "logvar", None) is not None:
            kl = divergence(codes.mean, codes.logvar, self.free_bits)
            losses["kl"] = kl * self._rise(model)
            losses.metrics["kl_nats"] = kl.detach()
        return losses

    def _rise(self, model: Any) -> float:
        trainer = getattr(model, "_trainer", None)
        if not self.training or not self.warmup or trainer is None:
            return 1.0
        steps = float(trainer.estimated_stepping_batches) * self.warmup
        return min(1.0, model.global_step / max(1.0, steps))
