"""The controls' encoder: a whole sentence as one vector, drawn from a Gaussian for a VAE. After Celotti et al. 2020."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from quire.contracts import Batch, Spec, build
from quire.roles.language.rows import left_aligned
from quire.roles.latent.contract import VectorCodes, VectorEncoder, check_positive


@dataclass
class SentenceCodes(VectorCodes):
    """One vector a sentence.

    Attributes:
        vector: [B,D] float; of a VAE a draw while training, else the mean.
        mean: [B,D] of a VAE's Gaussian, or None.
        logvar: [B,D], its log variance, or None.
    """

    mean: Tensor | None = None
    logvar: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """[B,1,D]: the vector as the one token of a source, for decoders that attend to one."""
        return self.vector[:, None]

    @property
    def mask(self) -> None:
        """Nothing of that source is padding."""
        return None


class SentenceEncoder(VectorEncoder):
    """A sentence's tokens as one vector of a given width, by a GRU or by another encoder of vectors.

    The control of Celotti et al. 2020's code: with ``TextAutoencoding`` it is an autoencoder, with ``variational`` a
    VAE, with ``encoder: Pooled`` round a TextEncoder a Transformer's.

    Args:
        latent_dim: D.
        width: Hidden units of the GRU.
        embedding: Width of a token's embedding.
        variational: A Gaussian for each sentence instead of a point.
        encoder: A VectorEncoder in the GRU's place; ``width`` and ``embedding`` are then not used.

    Returns:
        SentenceCodes: vector [B,D].

    Raises:
        ConfigError: a size below 1.
    """

    fields = ("tokens",)

    def __init__(
        self,
        latent_dim: int = 16,
        width: int = 128,
        embedding: int = 48,
        variational: bool = False,
        encoder: VectorEncoder | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, "latent_dim, width and embedding", latent_dim, width, embedding)
        self.width, self.hidden, self.embedding = latent_dim, width, embedding
        self.variational, self.encoder = variational, encoder

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small VAE of questions."""
        return tiny_autoencoder()

    def build(self, spec: Spec) -> None:
        """The GRU, or the encoder inside, and a projection to D, or to mean and log variance."""
        if self.encoder is not None:
            build(self.encoder, spec)
            given = int(self.encoder.sizes()["width"])
        else:
            self.token = nn.Embedding(int(spec.need("vocab_size", self)), self.embedding)
            self.rnn = nn.GRU(self.embedding, self.hidden, batch_first=True)
            given = self.hidden
        self.out = nn.Linear(given, self.width * (2 if self.variational else 1))

    def bind(self, model: Any) -> None:
        """The model's generator draws."""
        super().bind(model)
        self.refer("_source_of_chance", model.generator)

    def forward(self, batch: Batch) -> SentenceCodes:
        """Tokens [B,T] → [B,D]."""
        found = self.out(self._read(batch))
        if not self.variational:
            return SentenceCodes(found)
        mean, logvar = found.chunk(2, -1)
        logvar = logvar.clamp(-30, 20)
        vector = mean
        if self.training:
            noise = torch.randn(
                mean.shape, device=mean.device, generator=self.__dict__["_source_of_chance"](mean.device)
            )
            vector = mean + noise * (logvar / 2).exp()
        return SentenceCodes(vector, mean, logvar)

    def _read(self, batch: Batch) -> Tensor:
        if self.encoder is not None:
            return self.encoder(batch).vector
        ids, counts, _ = left_aligned(batch["tokens"], batch.get("mask"), "sentence")
        packed = pack_padded_sequence(self.token(ids), torch.tensor(counts), batch_first=True, enforce_sorted=False)
        return self.rnn(packed)[1][-1]


def divergence(mean: Tensor, logvar: Tensor, free_bits: float = 0.0) -> Tensor:
    """KL of N(mean, exp logvar) [B,D] from N(0, 1) in nats: summed over D, mean over B.

    Args:
        mean: [B,D].
        logvar: [B,D].
        free_bits: Bits that each dimension may have, in the batch's mean, at no cost.
    """
    kl = (0.5 * (mean.square() + logvar.exp() - 1 - logvar)).mean(0)
    return kl.clamp(min=free_bits * math.log(2)).sum() if free_bits else kl.sum()


def tiny_autoencoder(**parts: Any) -> dict[str, Any]:
    """A small VAE of questions of the small grammar."""
    small = {"width": 16, "embedding": 8}
    model = {
        "encoder": {"class_path": "SentenceEncoder", "init_args": {"latent_dim": 4, "variational": True, **small}},
        "decoder": {"class_path": "GRULanguageModel", "init_args": small},
        "objective": {"class_path": "TextAutoencoding", "init_args": {"kl_weight": 0.01}},
        **parts,
    }
    data = {"class_path": "QuestionGrammar", "init_args": {"sentences": 128, "held_out": 16, "batch_size": 16}}
    return {"model": model, "data": data}
