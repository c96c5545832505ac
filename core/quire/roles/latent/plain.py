"""Vector codes without parameters of their own: raw pixels, and the tokens of another encoder pooled."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import nn

from quire.contracts import Batch, Encoder, Role, Spec, build
from quire.errors import ConfigError
from quire.roles.latent.contract import VectorCodes, VectorEncoder, data_shape, read_data
from quire.roles.tokens.contract import TokenEncoder, Tokens


class FlatPixels(VectorEncoder):
    """The pixels themselves as code: no parameters.

    Returns:
        VectorCodes of width C*H*W, in the order of the image's memory.
    """

    fields = ("image",)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Classify raw pixels."""
        return {"model": {"encoder": "FlatPixels", "objective": "Classify"}, "data": "Digits"}

    def build(self, spec: Spec) -> None:
        """Note the size."""
        self.shape = data_shape(spec, self, "image")
        self.width = math.prod(self.shape)

    def forward(self, batch: Batch) -> VectorCodes:
        """Image [B,C,H,W] → [B,C*H*W]."""
        return VectorCodes(read_data(batch, self.shape, self).flatten(1))


class Pooled(VectorEncoder):
    """One vector out of a TokenEncoder's tokens, or out of sparse codes.

    Args:
        encoder: A TokenEncoder or SparseEncoder; it stays reachable for objectives that ask for one.
        pooling: ``"mean"`` over the real tokens, prefix and padding excluded; ``"class"``: the first prefix token.
            Sparse codes count as dense rows, those of [B,T,D] activations are averaged over T.

    Returns:
        VectorCodes of the encoder's width.

    Raises:
        ConfigError: an encoder that has no tokens, or class pooling of one without a class token (it is named).
    """

    def __init__(self, encoder: Encoder, pooling: Literal["mean", "class"] = "mean") -> None:
        super().__init__()
        if pooling not in ("mean", "class"):
            raise ConfigError(f"Pooled.pooling must be mean or class, got {pooling!r}")
        if encoder.role(TokenEncoder) is None and not _sparse(encoder):
            name = type(encoder).__name__
            raise ConfigError(f"Pooled needs an encoder of tokens or sparse codes; {name} gives none: use it as it is")
        self.encoder, self.pooling = encoder, pooling

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Classify the mean of a small ViT's tokens."""
        vit = {"class_path": "ViTEncoder", "init_args": {"patch": 2, "width": 16, "depth": 1, "heads": 2}}
        encoder = {"class_path": "Pooled", "init_args": {"encoder": vit}}
        return {"model": {"encoder": encoder, "objective": "Classify"}, "data": "Digits"}

    def build(self, spec: Spec) -> None:
        """Build the inner encoder."""
        build(self.encoder, spec)
        if self.pooling == "class" and not getattr(self.encoder, "prefix_tokens", 0):
            name = type(self.encoder).__name__
            raise ConfigError(f"Pooled: {name} has no class token: set its class_token: true, or pooling: mean")
        self.width = int(self.encoder.sizes()["width"])

    def forward(self, batch: Batch) -> VectorCodes:
        """Tokens [B,T,D] → [B,D]."""
        codes = self.encoder(batch)
        if isinstance(codes, Tokens):
            return VectorCodes(codes.pooled(self.pooling))
        dense, mask = codes.dense(), batch.get("mask")
        if dense.ndim == 2:
            return VectorCodes(dense)
        weight = dense.new_ones(dense.shape[:2]) if mask is None else mask.to(dense.dtype)
        return VectorCodes((dense * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp(min=1))

    def role(self, role: type[Role]) -> Role | None:
        """Itself, or what the inner encoder offers."""
        return self if isinstance(self, role) else self.encoder.role(role)

    def sizes(self) -> dict[str, Any]:
        """The inner encoder's too: an objective that asks for its tokens builds on them."""
        return {**self.encoder.sizes(), "width": self.width}

    def layers(self) -> list[nn.Module]:
        """The inner encoder's."""
        return self.encoder.layers()


def _sparse(encoder: Encoder) -> bool:
    from quire.roles.sparse.encoder import SparseEncoder  # late: it needs more of core than this does

    return isinstance(encoder, SparseEncoder)
