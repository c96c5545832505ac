"""Objectives of language models: the next token, alone or behind a source."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from quire.contracts import Batch, Losses, Objective
from quire.errors import ConfigError
from quire.roles.language.contract import StepModel, codes_of


class NextToken(Objective):
    """Cross-entropy of each next token.

    Args:
        smoothing: Label smoothing, in [0, 1).
        prompt_loss: Also score tokens of the prompt, where the batch has ``prompt_length``.
        class_dropout: Chance of replacing a sample's class by the null class, for guidance; needs ``prefix_classes``.
        z_loss: Weight of the squared log-partition, which keeps logits from drifting.
        doc_mask: Attention stays within documents, by the field ``doc``.

    Returns:
        ``next``: mean over real target tokens, in nats; ln V at chance. ``z``: mean squared log-partition, weighted by
        ``z_loss``. Also logged: perplexity, bits per token and per item.

    Raises:
        ConfigError: an argument out of range.
    """

    decoder: StepModel
    fields = ("tokens",)

    def __init__(
        self,
        smoothing: float = 0.0,
        prompt_loss: bool = False,
        class_dropout: float = 0.0,
        z_loss: float = 0.0,
        doc_mask: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= smoothing < 1 or not 0 <= class_dropout <= 1 or z_loss < 0:
            raise ConfigError(
                "NextToken needs smoothing in [0, 1), class_dropout in [0, 1] and z_loss >= 0;"
                f" got {smoothing}, {class_dropout}, {z_loss}"
            )
        self.smoothing, self.prompt_loss, self.class_dropout = smoothing, prompt_loss, class_dropout
        self.z_loss, self.doc_mask = z_loss, doc_mask
        self.weights = {"z": z_loss}

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small language model on the standard library's text."""
        from quire.roles.language.accept import tiny_speculative

        return tiny_speculative({})

    def check(self, model: Any) -> None:
        """Dropped classes need classes."""
        decoder = None if model.decoder is None else model.decoder.role(StepModel)
        if self.class_dropout and not getattr(decoder, "prefix_classes", None):
            raise ConfigError(
                "NextToken.class_dropout needs a decoder with prefix_classes, CausalLM for one: set it to 0"
            )

    def reads(self, stage: str) -> tuple[str, ...]:
        """Tokens, and the documents' numbers with ``doc_mask``."""
        return (*self.fields, "doc") if self.doc_mask else self.fields

    def forward(self, model: Any, batch: Batch) -> Losses:
        """Score the batch's tokens."""
        decoder: StepModel = model.decoder.role(StepModel)
        tokens, mask = batch["tokens"], batch.get("mask")
        extra: dict[str, Any] = {}
        if self.doc_mask:
            extra["doc"] = batch["doc"][:, :-1]
        if getattr(decoder, "prefix_classes", None) is not None:
            extra["label"] = self._classes(decoder, batch["label"], model)
        inside = None if mask is None else mask[:, :-1]
        logits = decoder(None, tokens[:, :-1], inside, **extra)
        return score(logits, tokens, scored(batch, self.prompt_loss), self.smoothing, self.z_loss > 0, "next")

    def _classes(self, decoder: Any, label: Tensor, model: Any) -> Tensor:
        if not self.class_dropout or not self.training:
            return label
        gone = torch.rand(label.shape, device=label.device, generator=model.generator(label.device))
        return label.where(gone >= self.class_dropout, torch.full_like(label, decoder.prefix_classes))


class Seq2SeqTokens(Objective):
    """Cross-entropy of target tokens behind a source, teacher forced.

    Args:
        smoothing: Label smoothing, in [0, 1).

    Returns:
        ``seq2seq``: mean over real target tokens, in nats.

    Raises:
        ConfigError: ``smoothing`` outside [0, 1).
    """

    decoder: StepModel
    fields = ("source", "tokens")

    def __init__(self, smoothing: float = 0.1) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ConfigError(f"Seq2SeqTokens.smoothing must be in [0, 1), got {smoothing}")
        self.smoothing = smoothing

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Reverse three digits."""
        from quire.datasets.algorithmic import Algorithmic

        return Algorithmic.tiny()

    def forward(self, model: Any, batch: Batch) -> Losses:
        """Score the batch's targets."""
        tokens, mask = batch["tokens"], batch.get("mask")
        logits = model.decoder.role(StepModel)(
            codes_of(model, batch), tokens[:, :-1], None if mask is None else mask[:, :-1]
        )
        return score(logits, tokens, scored(batch, True), self.smoothing, False, "seq2seq")


def scored(batch: Batch, prompt: bool) -> Tensor:
    """[B,T-1] bool: which next tokens count: real ones, behind the prompt."""
    tokens = batch["tokens"]
    mask = batch.get("mask")
    counts = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    counts = counts[:, 1:] & counts[:, :-1]
    if not prompt and "prompt_length" in batch:
        places = (torch.ones_like(tokens) if mask is None else mask.long()).cumsum(1)[:, 1:] - 1
        counts = counts & (places >= batch["prompt_length"][:, None])
    return counts


def score(logits: Tensor, tokens: Tensor, counts: Tensor, smoothing: float, z_loss: bool, name: str) -> Losses:
    """Mean cross-entropy over the counted next tokens, with what is worth logging.

    Args:
        logits: [B,T-1,V].
        tokens: [B,T].
        counts: [B,T-1] bool.
    """
    target = tokens[:, 1:].masked_fill(~counts, -100)
    flat = logits.float().flatten(0, 1)
    loss = cross_entropy(flat, target.flatten(), label_smoothing=smoothing)
    terms = {name: loss}
    if z_loss:
        terms["z"] = (flat.logsumexp(-1).square() * counts.flatten()).sum() / counts.sum().clamp(min=1)

    def nats() -> Tensor:
        return cross_entropy(flat.detach(), target.flatten()) if smoothing else loss.detach()

    metrics = {
        "perplexity": lambda: nats().exp(),
        "bits_per_token": lambda: nats() / math.log(2),
        "bits_per_item": lambda: nats() / math.log(2) * counts.sum() / len(counts),
    }
    return Losses(terms, metrics, {"logits": logits, "counts": counts})
