"""RetrievalEncoder: a BERT-shaped transformers model as a token encoder, with an MLM head and one vector a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quire.contracts import Batch, Spec
from quire.errors import ConfigError, DataError
from quire.roles.tokens.contract import Layout, Segment, Subset, TokenEncoder, Tokens, gather, indices, layer_number
from quire.roles.tokens.positions import attached, check_kind, sincos
from quire_dupmae import bert


class RetrievalEncoder(TokenEncoder):
    """A BERT, RoBERTa or alike of transformers, from the hub or from scratch. Xiao et al. 2022 (DupMAE).

    The start token is the first content token, as in the ids; its state is the dense vector of the text. All weights
    are the module's own, MLM head included, so ``save_pretrained`` writes what ``from_pretrained`` reads.

    Args:
        name_or_config: A folder or hub name, with weights; or a config such as ``{hidden_size: 64,
            num_hidden_layers: 2}`` for random ones, ``model_type`` bert unless it says so. Vocabulary, padding id and
            positions that a config leaves out come from the data.
        pooling: ``cls``, the first token's state, or ``mean`` over the real tokens.
        dense_dim: Width of the dense vector, a linear map without bias of the pooled state, which fine-tuning learns;
            null is the state itself, for search right after pretraining.
        positions: ``learned``, the model's own table, or ``none``: the table is zero and frozen (position prediction).

    Returns:
        Tokens: values [B,T,D], mask [B,T]; ``logits`` [B,T,V]; ``dense`` [B,dense_dim].

    Raises:
        ConfigError: nothing to load, an encoder-decoder or causal model, one that isn't BERT-shaped, texts longer than
            its positions, or a vocabulary smaller than the tokenizer's.
        DataError: an id outside the vocabulary.
    """

    fields = ("tokens",)
    capabilities = frozenset({"subset", "context", "features", "lm_head"})

    def __init__(
        self,
        name_or_config: str | dict[str, Any],
        pooling: Literal["cls", "mean"] = "cls",
        dense_dim: int | None = 384,
        positions: Literal["learned", "none"] = "learned",
    ) -> None:
        super().__init__()
        if pooling not in ("cls", "mean"):
            raise ConfigError(f"RetrievalEncoder.pooling must be cls or mean, got {pooling!r}")
        if dense_dim is not None and dense_dim < 1:
            raise ConfigError(f"RetrievalEncoder.dense_dim must be at least 1 or null, got {dense_dim}")
        # a checkpoint made later holds positions that were attached
        self.positions = check_kind(positions, ("learned", "sincos", "none"))
        self.pooling, self.dense_dim = pooling, dense_dim
        self.path: str | None = None
        if isinstance(name_or_config, str):  # a checkpoint holds the weights, so the config is what rebuilds it
            self.path, name_or_config = bert.recorded(name_or_config)
            self.init_args = {"name_or_config": name_or_config, "pooling": pooling, "dense_dim": dense_dim}
            self.init_args["positions"] = positions
        self.config = dict(name_or_config)
        self.module: Any = None
        self.table_std: float | None = None  # start of an attached table

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Contrastive training of a small BERT on docstrings, dense and lexical part."""
        from quire_dupmae.tuning import Contrastive

        return Contrastive.tiny()

    def check(self, model: Any) -> None:
        """Refuse a config that transformers can't read or that is no masked language model."""
        if self.module is None:
            bert.fresh_config(self.config, Spec())

    # ---- life
    def build(self, spec: Spec) -> None:
        """Make or load the module; the data's texts and tokenizer must fit."""
        config = bert.fresh_config(self.config, spec)
        self.module = bert.make(self.path, config)
        config = self.module.config
        self.width, self.ids = int(config.hidden_size), int(config.vocab_size)
        length, most = spec.get("length"), self._most()
        if length is not None and length > most:
            raise ConfigError(f"max_length {length} exceeds the encoder's {most} positions: shorten data.max_length")
        said = spec.get("vocab_size")
        if said is not None and said > self.ids:
            raise ConfigError(
                f"the data's tokenizer has {said} ids but the encoder has {self.ids} rows: use the model's own"
                " tokenizer (WordPiece with path)"
            )
        if self.positions != "learned" or self.table_std is not None:
            self._fill_table()
        self.projection = nn.Identity() if self.dense_dim is None else nn.Linear(self.width, self.dense_dim, bias=False)

    def _most(self) -> int:
        return int(self.module.config.max_position_embeddings) - bert.first_place(self.module)

    @torch.no_grad()
    def _fill_table(self) -> None:
        table, first = self.module.base_model.embeddings.position_embeddings, bert.first_place(self.module)
        table.weight.zero_()
        if self.positions == "sincos":
            table.weight[first:] = sincos((len(table.weight) - first,), self.width)
        elif self.positions == "learned" and self.table_std:
            nn.init.trunc_normal_(table.weight, std=self.table_std)
        table.weight.requires_grad_(self.positions == "learned")

    def attach_positions(self, kind: str, init: str = "zeros", std: float = 0.02) -> None:
        """Give an encoder without positions a table; ``init_args`` says so, so a checkpoint rebuilds with it."""
        if not attached(self, kind, init, self.positions):
            return
        self.table_std = std if init == "normal" else 0.0
        if self.module is not None:
            self._fill_table()

    def layers(self) -> list[nn.Module]:
        """Embeddings, then the layers."""
        return [self.module.base_model.embeddings, *self.module.base_model.encoder.layer]

    # ---- tokens
    def layout(self, source: Batch | Spec) -> Layout:
        """Places of a batch's tokens, or of a spec's ``length``."""
        given = source.get("tokens")
        length = given.shape[1] if isinstance(given, Tensor) else Spec(source).need("length", self)
        return Layout.of(Segment("text", (int(length),), (1,), "tokens"))

    def token_mask(self, batch: Batch) -> Tensor | None:
        """The batch's own mask."""
        return batch.get("mask")

    def embed(self, batch: Batch) -> Tokens:
        """Word, place and type vectors, normalised: [B,T,D]."""
        ids = batch["tokens"]
        if ids.shape[1] > self._most():
            raise DataError(f"tokens has {ids.shape[1]} places but the encoder has {self._most()} positions")
        if not ids.is_cuda and ids.numel():  # on a GPU it would wait
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.ids:
                raise DataError(f"token id {low if low < 0 else high} but the encoder has {self.ids} rows")
        index = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        values = self.embed_values(self.module.base_model.embeddings.word_embeddings(ids), index)
        return Tokens(values, index, self.layout(batch), self.token_mask(batch))  # type: ignore[arg-type]

    def embed_values(self, vectors: Tensor, index: Tensor) -> Tensor:
        """The embedding module on vectors [B,T,D] in the place of words, at places ``index`` [B,T]."""
        return bert.embedded(self.module, vectors, index)

    def place_rows(self, index: Tensor) -> Tensor:
        """Rows of the position table, [B,T] → [B,T,D]."""
        return bert.places(self.module, index)

    def encode(
        self,
        tokens: Tokens,
        keep: Subset | Tensor | None = None,
        context: Subset | Tensor | None = None,
        context_update: bool = True,
    ) -> Tokens:
        """Run the layers on all, kept, or context-restricted tokens."""
        if keep is not None:
            tokens = tokens.take(indices(keep, tokens.values.shape[1]))
        return self._walk(tokens, self.module.base_model.encoder.layer, context, context_update)

    def _walk(self, tokens: Tokens, layers: Any, context: Any = None, context_update: bool = True) -> Tokens:
        x, mask = tokens.values, tokens.mask if tokens.padded else None
        chosen = None if context is None else indices(context, x.shape[1], "context")
        keys = mask if chosen is None or mask is None else mask.gather(1, chosen)
        frozen = None if chosen is None or context_update else gather(x, chosen)
        for layer in layers:
            source = frozen if frozen is not None else x if chosen is None else gather(x, chosen)
            x = bert.attend(layer, x, source, keys)
        return tokens.with_values(x)

    def features(self, batch: Batch, layer: int = -1) -> Tokens:
        """Hidden states after layer ``layer`` (0: embedded tokens; -1: last layer)."""
        layers = self.module.base_model.encoder.layer
        return self._walk(self.embed(batch), layers[: layer_number(layer, len(layers), "RetrievalEncoder")])

    # ---- what retrieval reads
    def logits(self, tokens: Tokens | Tensor) -> Tensor:
        """The MLM head: [B,T,V] from Tokens or hidden states […,D]."""
        return bert.logits(self.module, tokens.values if isinstance(tokens, Tokens) else tokens)

    def dense(self, tokens: Tokens) -> Tensor:
        """The dense vector of each text, [B,dense_dim]."""
        return self.projection(tokens.values[:, 0] if self.pooling == "cls" else tokens.pooled("mean"))

    def sizes(self) -> dict[str, Any]:
        """As every token encoder, and ``vocab_size``."""
        return {**super().sizes(), "vocab_size": self.ids}

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the module, MLM head included, for ``AutoModelForMaskedLM.from_pretrained``. Returns the folder."""
        self.module.save_pretrained(str(folder))
        return Path(folder)
