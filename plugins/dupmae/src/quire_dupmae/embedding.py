"""HybridEmbedding: a text as its dense vector and its strongest vocabulary terms, and how two are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from quire.contracts import Batch, Part, Spec
from quire.errors import ConfigError
from quire.roles.tokens.contract import TokenEncoder, Tokens
from quire_dupmae.modules import pooled_logits


@dataclass
class Vectors:
    """Embedded texts.

    Attributes:
        dense: [B,d]; d is 0 without a dense part.
        lexical: [B,V] over the vocabulary, 0 outside the kept terms; V is 0 without a lexical part.
    """

    dense: Tensor
    lexical: Tensor


def scores(queries: Vectors, documents: Vectors) -> Tensor:
    """Inner products of all queries with all documents, dense plus lexical: [Q,N]."""
    return queries.dense @ documents.dense.T + queries.lexical @ documents.lexical.T


def keep_largest(terms: Tensor, k: int) -> Tensor:
    """The k largest of each row [B,V] in their places, 0 elsewhere; all of them when k is V."""
    if k >= terms.shape[1]:
        return terms
    top = terms.topk(k, dim=1)
    return torch.zeros_like(terms).scatter(1, top.indices, top.values)


def dense_vector(encoder: Any, codes: Tokens) -> Tensor:
    """The encoder's own dense vector, or the first token's state of one that has none: [B,d]."""
    return encoder.dense(codes) if hasattr(encoder, "dense") else codes.values[:, 0]


class HybridEmbedding(Part):
    """Dense vector plus the k largest pooled MLM logits of the unmasked text. Xiao et al. 2022 (DupMAE), second-hand.

    A document keeps its terms as (index, value) pairs; a query may stay dense over the vocabulary. The score is the sum
    of both inner products. No public code offers it; sizes come from a digest of the paper.

    Args:
        lexical_k: Terms kept, at most V; 0 is the dense vector alone.
        lexical_activation: ``none``, ``relu`` or ``log1p_relu`` (SPLADE's) on the pooled logits.
        sparsify_query: Whether queries keep only their k largest too.
        dense: Whether the dense vector takes part; false is lexical search alone.

    Raises:
        ConfigError: k above the vocabulary or below 0, another activation, neither part.
    """

    def __init__(
        self,
        lexical_k: int = 384,
        lexical_activation: Literal["none", "relu", "log1p_relu"] = "none",
        sparsify_query: bool = False,
        dense: bool = True,
    ) -> None:
        super().__init__()
        if lexical_activation not in ("none", "relu", "log1p_relu"):
            raise ConfigError(
                f"HybridEmbedding.lexical_activation must be none, relu or log1p_relu, got {lexical_activation!r}"
            )
        if lexical_k < 0 or (not lexical_k and not dense):
            raise ConfigError(f"HybridEmbedding.lexical_k must be at least 0 (1 without dense), got {lexical_k}")
        self.lexical_k, self.lexical_activation = lexical_k, lexical_activation
        self.sparsify_query, self.dense = sparsify_query, dense
        self.special: list[int] = []

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Contrastive training on docstrings with both parts."""
        from quire_dupmae.tuning import Contrastive

        return Contrastive.tiny()

    def build(self, spec: Spec) -> None:
        """Note the special ids, which carry no word; refuse k above the vocabulary."""
        self.special = [int(spec[n]) for n in ("pad", "bos", "eos", "mask_id") if spec.get(n) is not None]
        if self.lexical_k:
            vocabulary = int(spec.code("vocab_size", self))
            if self.lexical_k > vocabulary:
                raise ConfigError(f"lexical_k={self.lexical_k} exceeds the vocabulary {vocabulary}")

    def needs(self) -> frozenset[str]:
        """What the encoder must be able to do."""
        return frozenset({"lm_head"} if self.lexical_k else ())

    def forward(self, encoder: TokenEncoder, tokens: Tensor, mask: Tensor, query: bool = False) -> Vectors:
        """Embed texts.

        Args:
            encoder: Gives states and, for the lexical part, logits.
            tokens: [B,T] int64, start token first.
            mask: [B,T] bool.
            query: Whether they are queries.
        """
        batch: Batch = {"tokens": tokens, "mask": mask}
        codes = encoder(batch)
        vector = dense_vector(encoder, codes)
        empty = vector.new_zeros(len(vector), 0)
        return Vectors(
            vector if self.dense else empty, self.terms(encoder, codes, tokens, query) if self.lexical_k else empty
        )

    def terms(self, encoder: Any, codes: Tokens, tokens: Tensor, query: bool) -> Tensor:
        """[B,V]: the maximum over ordinary tokens of the logits, activated and cut to the largest k."""
        ordinary = codes.mask & ~torch.isin(tokens, torch.tensor(self.special, device=tokens.device))
        pooled = pooled_logits(codes.values, ordinary, encoder.logits, 4096)
        if self.lexical_activation != "none":
            pooled = pooled.relu()
        if self.lexical_activation == "log1p_relu":
            pooled = pooled.log1p()
        return pooled if query and not self.sparsify_query else keep_largest(pooled, self.lexical_k)
