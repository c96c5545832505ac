"""A transformer over token ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quire.contracts import Batch, Spec
from quire.errors import ConfigError, DataError
from quire.roles.tokens.blocks import Rotation, xavier
from quire.roles.tokens.contract import Layout, Segment, Tokens
from quire.roles.tokens.positions import rotary
from quire.roles.tokens.trunk import TrunkEncoder


class LanguageHead(nn.Module):
    """Hidden states → logits over the vocabulary: linear, GELU, LayerNorm, then the tied embedding and a bias."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.dense = xavier(nn.Linear(width, width))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, values: Tensor, embedding: Tensor) -> Tensor:
        """[…,D] and [V,D] → […,V]."""
        return F.linear(self.norm(F.gelu(self.dense(values))), embedding, self.bias)


class TextEncoder(TrunkEncoder):
    """Plain bidirectional pre-norm transformer on token ids; also the source side of encoder-decoder models.

    Reads ``source`` and ``source_mask`` where the batch has them, else ``tokens`` and ``mask``.

    Args:
        vocab_size: V; from the data when null.
        length: Most tokens in a row; from the data when null.
        width: D.
        depth: Number of blocks.
        heads: Attention heads; they divide the width.
        mlp_ratio: Hidden width of the MLP over D.
        class_token: Whether a learned token goes before the others; it has no position.
        positions: ``learned``, ``rope`` (rotated queries and keys), ``sincos`` (fixed) or ``none``.
        lm_head: Whether ``logits`` exists: linear, GELU, norm and the tied embedding.
        key_bias: Whether keys have a bias.
        layer_scale: Start of a learned factor on each residual branch; null for no factor.
        drop_path: Share of residual branches dropped in the last block, rising linearly from 0.
        final_norm: Whether a LayerNorm follows the last block.
        start: Start of the weights: ``normal``, truncated and of deviation 0.02, or ``xavier``, uniform as in MAE.

    Returns:
        Tokens: values [B,T,D], mask [B,T].

    Raises:
        ConfigError: a length or vocabulary that clashes with the data, heads of odd width with ``rope``.
        DataError: an id outside the vocabulary.
    """

    fields = ("source|tokens",)
    capabilities = frozenset({"subset", "context", "features", "lm_head"})
    kinds = ("learned", "rope", "sincos", "none")

    def __init__(
        self,
        vocab_size: int | None = None,
        length: int | None = None,
        width: int = 256,
        depth: int = 6,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        class_token: bool = False,
        positions: str = "learned",
        lm_head: bool = True,
        key_bias: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        final_norm: bool = True,
        start: str = "normal",
    ) -> None:
        super().__init__(
            width, depth, heads, mlp_ratio, class_token, positions, key_bias, layer_scale, drop_path, final_norm, start
        )
        if positions == "rope" and (width // heads) % 2:
            raise ConfigError(f"rope needs heads of even width, got width={width} / heads={heads} = {width // heads}")
        self.vocab_size, self.length, self.lm_head = vocab_size, length, lm_head
        if not lm_head:
            self.capabilities = self.capabilities - {"lm_head"}

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Masked words of the standard library's documentation."""
        from quire.roles.tokens.reconstruct import TokenIds

        return TokenIds.tiny()

    def layout(self, source: Batch | Spec) -> Layout:
        """Places of a batch's tokens, or of a spec's ``length``."""
        name = _field(source)
        given = source.get(name)
        length = given.shape[1] if isinstance(given, Tensor) else Spec(source).agree("length", self.length, self)
        return Layout.of(Segment("text", (int(length),), (1,), name))

    def token_mask(self, batch: Batch) -> Tensor | None:
        """The batch's own mask."""
        return batch.get("source_mask" if _field(batch) == "source" else "mask")

    def build(self, spec: Spec) -> None:
        """Make embedding, trunk and head."""
        super().build(spec)
        if self.lm_head:
            self.head = LanguageHead(self.width, self.ids)

    def make_stem(self, spec: Spec) -> nn.Module:
        """The embedding table."""
        self.ids = int(spec.agree("vocab_size", self.vocab_size, self))
        table = nn.Embedding(self.ids, self.width)
        nn.init.normal_(table.weight, std=self.width**-0.5)
        return table

    def cut(self, batch: Batch) -> Tensor:
        """Ids [B,T]."""
        name = _field(batch)
        tokens = batch[name]
        if not tokens.is_cuda and tokens.numel() and not torch.compiler.is_compiling():  # on a GPU it would wait
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.ids:
                raise DataError(f"{name} has id {low if low < 0 else high} but vocab_size={self.ids}")
        return tokens

    def rotation(self, tokens: Tokens) -> Rotation | None:
        """Angles of the tokens' own places; prefix tokens aren't turned."""
        if self.positions != "rope":
            return None
        index = tokens.index
        if index.stride(0) == 0:  # the same places on every row
            index = index[:1]
        return rotary(F.pad(index, (tokens.prefix.shape[1], 0)), self.width // self.heads)

    def logits(self, tokens: Tokens | Tensor) -> Tensor:
        """Logits over the vocabulary, [B,T,V], from Tokens or hidden states [B,T,D].

        Raises:
            ConfigError: the encoder was made with ``lm_head: false``.
        """
        if not self.lm_head:
            raise ConfigError("TextEncoder has no head; set lm_head: true")
        return self.head(tokens.values if isinstance(tokens, Tokens) else tokens, self.stem.weight)

    def sizes(self) -> dict[str, Any]:
        """As every token encoder, and ``vocab_size``."""
        return {**super().sizes(), "vocab_size": self.ids}


def _field(source: Batch | Spec) -> str:
    return "source" if isinstance(source.get("source"), Tensor) else "tokens"
