"""DuplexDecoder: a sentence out of its one vector, with another mask on every row (DupMAE, Xiao et al. 2022)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from quire.contracts import Decoder, Spec
from quire.errors import ConfigError
from quire.roles.tokens.contract import TokenEncoder, Tokens
from quire_dupmae.masking import open_share, row_masks
from quire_dupmae.modules import DuplexLayer


class DuplexDecoder(Decoder):
    """One transformer layer that rebuilds each token from the text's vector and about half of the others. Xiao et al.

    Queries are the text's vector at every place; keys and values are that vector and the embedded original tokens. Its
    embedding and vocabulary head are the encoder's.

    Args:
        query: ``duplex`` puts the vector through the encoder's embedding module (place, type, norm, dropout), as
            DupMAE's code; ``retro`` only adds the place, as RetroMAE.
        layers: Layers; the paper's one is meant to be weak.
        mask_ratio: Share of a text's tokens that a row doesn't see, in (0, 1).
        pool: Most whole-word masks drawn for one text; each row takes one of them.
        chunk: Tokens whose logits exist at a time.
        heads: Attention heads; null is one for 64 of the width.
        mlp_ratio: Hidden width of the MLP over D.
        dropout: On attention weights and both branches.

    Returns:
        Hidden states [B,M,D] for the encoder's head.

    Raises:
        ConfigError: a value out of its range, heads that don't divide the width, an encoder without positions.
    """

    def __init__(
        self,
        query: Literal["duplex", "retro"] = "duplex",
        layers: int = 1,
        mask_ratio: float = 0.5,
        pool: int = 256,
        chunk: int = 1024,
        heads: int | None = None,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if query not in ("duplex", "retro"):
            raise ConfigError(f"DuplexDecoder.query must be duplex or retro, got {query!r}")
        for name, value in (("layers", layers), ("pool", pool), ("chunk", chunk), ("heads", heads or 1)):
            if value < 1:
                raise ConfigError(f"DuplexDecoder.{name} must be at least 1, got {value}")
        self.query, self.layers, self.mask_ratio = query, layers, open_share("mask_ratio", mask_ratio)
        self.pool, self.chunk, self.heads, self.mlp_ratio, self.dropout = pool, chunk, heads, mlp_ratio, dropout

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Pretraining on docstrings."""
        from quire_dupmae.objective import DuplexAutoencoding

        return DuplexAutoencoding.tiny()

    def build(self, spec: Spec) -> None:
        """Make the layers."""
        width = int(spec.code("width", self))
        heads = self.heads or max(1, width // 64)
        if width % heads:
            raise ConfigError(f"DuplexDecoder has width {width}, not divisible by heads={heads}: set decoder.heads")
        hidden = round(self.mlp_ratio * width)
        self.blocks = nn.ModuleList(DuplexLayer(width, heads, hidden, self.dropout) for _ in range(self.layers))

    def queries(self, encoder: Any, vector: Tensor, tokens: Tokens) -> Tensor:
        """[B,T,D]: the text's vector [B,D] at the place of each token.

        Raises:
            ConfigError: an encoder without positions: its queries would all be the same.
        """
        broadcast = vector[:, None].expand(-1, tokens.index.shape[1], -1)
        if encoder.positions == "none":
            raise ConfigError(
                f"DuplexDecoder asks by place, but encoder {type(encoder).__name__} has no positions: set learned ones"
            )
        if self.query == "duplex" and hasattr(encoder, "embed_values"):
            return encoder.embed_values(broadcast, tokens.index)
        if hasattr(encoder, "place_rows"):
            return broadcast + encoder.place_rows(tokens.index)
        if getattr(encoder, "places", None) is None:
            raise ConfigError(
                f"DuplexDecoder asks by place, but encoder {type(encoder).__name__} adds no table of positions"
                f" ({encoder.positions}): use learned or sincos ones"
            )
        return broadcast + encoder.places(tokens.layout)[tokens.index]  # our own trunks embed without a norm

    def visible(self, word_ids: Tensor, candidates: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """What each row sees, [B,T,T]; arguments as in ``row_masks``."""
        return row_masks(word_ids, candidates, mask, self.mask_ratio, self.pool, generator)

    def forward(self, vector: Tensor, contents: Tensor, queries: Tensor, visible: Tensor) -> Tensor:
        """Rebuild.

        Args:
            vector: [B,D], the text's vector: key and value 0.
            contents: [B,N,D], embedded tokens: the other keys and values.
            queries: [B,M,D].
            visible: [B,M,1+N] bool.
        """
        keys = torch.cat([vector[:, None], contents], 1)
        for block in self.blocks:
            queries = block(queries, keys, visible)
        return queries


def rebuild(
    decoder: DuplexDecoder,
    encoder: TokenEncoder,
    vector: Tensor,
    original: Tokens,
    visible: Tensor,
) -> Tensor:
    """Hidden states [B,T,D] of a text's places from its vector; the start token's slot holds the vector itself.

    Args:
        decoder: The decoder.
        encoder: Gives the queries' places.
        vector: [B,D].
        original: The embedded original tokens, start token first.
        visible: [B,T,T] bool; column 0 is the vector.
    """
    queries = decoder.queries(encoder, vector, original)
    return decoder(vector, original.values[:, 1:], queries, visible)
