"""Fine-tuning: InfoNCE with hard negatives across processes, and distillation from a teacher's scores."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quire.contracts import Batch, Losses, Objective
from quire.errors import ConfigError
from quire.roles.tokens.contract import TokenEncoder
from quire_dupmae.embedding import HybridEmbedding, Vectors, scores
from quire_dupmae.objective import SMALL, small_data

if TYPE_CHECKING:
    from quire.model import Model


def tiny_tuning(objective: dict[str, Any], **data: Any) -> dict[str, Any]:
    """A small BERT, tuned on docstrings with both parts of the embedding, and searched."""
    embedding = {"class_path": "HybridEmbedding", "init_args": {"lexical_k": 20}}
    encoder = {"class_path": "RetrievalEncoder", "init_args": {"name_or_config": SMALL, "dense_dim": 16}}
    objective = {**objective, "init_args": {**objective.get("init_args", {}), "embedding": embedding}}
    sampler = {"class_path": "HybridSearch", "init_args": {"top": 20, "embedding": embedding}}
    metrics = [{"class_path": n} for n in ("MRR", "NDCG", "RecallAtK")]
    return {
        "model": {"encoder": encoder, "objective": objective, "sampler": sampler, "metrics": metrics},
        "data": small_data(**data),
    }


class _Compared(Objective):
    """What both objectives share: embedded queries and documents."""

    encoder: TokenEncoder

    def __init__(self, embedding: HybridEmbedding | None, temperature: float) -> None:
        super().__init__()
        if temperature <= 0:
            raise ConfigError(f"{type(self).__name__}.temperature must be above 0, got {temperature:g}")
        self.embedding = embedding or HybridEmbedding(lexical_k=0)
        self.temperature = temperature

    def check(self, model: Model) -> None:
        """The lexical part needs a vocabulary head."""
        for capability in sorted(self.embedding.needs()):
            if capability not in model.encoder.capabilities:
                raise ConfigError(
                    f"HybridEmbedding needs {capability!r}; {type(model.encoder).__name__}"
                    f" {model.encoder.lacks(capability)}: set lexical_k: 0"
                )

    def embed(self, model: Model, batch: Batch) -> tuple[Vectors, Vectors]:
        """Queries [B,…]; positives [B,…] and behind them the negatives [B*K,…], those of a row together."""
        queries = self.embedding(model.encoder, batch["query"], batch["query_mask"], query=True)
        tokens, mask = batch["positive"], batch["positive_mask"]
        if "negative" in batch:
            tokens = torch.cat([tokens, batch["negative"].flatten(0, 1)])
            mask = torch.cat([mask, batch["negative_mask"].flatten(0, 1)])
        return queries, self.embedding(model.encoder, tokens, mask)

    def contrast(self, queries: Vectors, documents: Vectors, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """InfoNCE: the loss, the scores [B,N], and the place [B] of each query's own document."""
        found = scores(queries, documents) / self.temperature
        own = torch.arange(len(found), device=found.device) + first
        return F.cross_entropy(found.float(), own), found, own


class Contrastive(_Compared):
    """InfoNCE over a batch's documents and hard negatives, by inner product. Xiao et al. 2022; second-hand.

    Every other document of the batch, on all processes, is a negative too. Vectors aren't normalised.

    Args:
        temperature: Divides the scores.
        cross_device: Whether documents of the other processes are negatives too, in training.
        embedding: How texts become vectors; null is the dense vector alone, as in the official code.

    Needs:
        encoder: TokenEncoder, with ``lm_head`` for a lexical part. Fields: query, positive, their masks, and negative
        where the data has some.

    Returns:
        ``contrastive``: cross-entropy of the own document among N in nats, ln N at chance. Outputs ``scores`` [B,N] and
        ``own`` [B] for the metrics.

    Raises:
        ConfigError: a temperature that isn't above 0, a lexical part on an encoder without a head.
    """

    fields = ("query", "query_mask", "positive", "positive_mask")

    def __init__(
        self, temperature: float = 1.0, cross_device: bool = True, embedding: HybridEmbedding | None = None
    ) -> None:
        super().__init__(embedding, temperature)
        self.cross_device = cross_device

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small BERT on docstrings."""
        return tiny_tuning({"class_path": "Contrastive"})

    def forward(self, model: Model, batch: Batch) -> Losses:
        """The term of one batch."""
        warn_of_twins(batch["positive"])
        queries, documents = self.embed(model, batch)
        first = 0
        if self.cross_device and self.training and torch.distributed.is_initialized():
            first = torch.distributed.get_rank() * len(documents.dense)
            documents = Vectors(_gathered(documents.dense), _gathered(documents.lexical))
        loss, found, own = self.contrast(queries, documents, first)
        right = {"in_batch_accuracy": lambda: (found.argmax(1) == own).float().mean()}
        return Losses({"contrastive": loss}, right, {"scores": found, "own": own})


class DistillKL(_Compared):
    """Match a teacher's scores of a query's own documents, and a little InfoNCE. Xiao et al. 2022; second-hand.

    The divergence is averaged over queries (batchmean); the official code averages over all B*N scores.

    Args:
        temperature: Divides both scores.
        contrastive_weight: Factor of InfoNCE over the batch.
        embedding: As in ``Contrastive``.

    Needs:
        encoder: TokenEncoder. Fields: query, positive, negative, their masks, teacher_scores [B,1+K].

    Returns:
        ``distill``: KL divergence of the student's from the teacher's distribution over 1 + K documents, in nats.
        ``contrastive``: as in ``Contrastive``.

    Raises:
        ConfigError: a temperature that isn't above 0, a negative weight.
    """

    fields = ("query", "query_mask", "positive", "positive_mask", "negative", "negative_mask", "teacher_scores")

    def __init__(
        self, temperature: float = 1.0, contrastive_weight: float = 1e-4, embedding: HybridEmbedding | None = None
    ) -> None:
        super().__init__(embedding, temperature)
        if contrastive_weight < 0:
            raise ConfigError(f"DistillKL.contrastive_weight must be at least 0, got {contrastive_weight}")
        self.weights = {"contrastive": contrastive_weight}

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small BERT taught by BM25 on docstrings."""
        return tiny_tuning({"class_path": "DistillKL"}, negatives=2, teacher=True)

    def forward(self, model: Model, batch: Batch) -> Losses:
        """Both terms of one batch."""
        queries, documents = self.embed(model, batch)
        loss, found, own = self.contrast(queries, documents)
        rows, given = len(found), batch["teacher_scores"]
        behind = torch.arange(rows * (given.shape[1] - 1), device=found.device).view(rows, -1) + rows
        ours = found.gather(1, torch.cat([own[:, None], behind], 1))
        wanted = (given / self.temperature).softmax(1)
        distill = F.kl_div(ours.float().log_softmax(1), wanted, reduction="batchmean")
        return Losses({"distill": distill, "contrastive": loss}, outputs={"scores": found, "own": own})


def warn_of_twins(documents: Tensor) -> None:
    """Warn when two rows [B,T] of a batch are one document: InfoNCE then pushes away what it should find."""
    if documents.is_cuda:  # it would wait
        return
    different = len(torch.unique(documents, dim=0))
    if different < len(documents):
        warnings.warn(
            f"{len(documents) - different} of {len(documents)} documents in the batch are duplicates, which are false"
            " negatives of each other: remove them from the data",
            stacklevel=2,
        )


def _gathered(vectors: Tensor) -> Tensor:
    """Rows of all processes, with a gradient to each."""
    import torch.distributed.nn.functional as across

    return torch.cat(across.all_gather(vectors.contiguous()))
