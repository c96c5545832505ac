"""Features of whole splits: codes to one vector or to tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from quire.contracts import Batch, Encoder
from quire.errors import ConfigError, DataError
from quire.roles.tokens.contract import TokenEncoder, Tokens

POOLINGS = ("mean", "class")
Read = Callable[[Batch], tuple[Tensor, Tensor | None]]
"""batch → (values [B,D] or [B,T,D], mask [B,T] or None)."""


def check_pooling(pooling: str, asker: object) -> None:
    """Raise ``ConfigError`` for a word that is no pooling."""
    if pooling not in POOLINGS:
        raise ConfigError(f"{type(asker).__name__}.pooling must be mean or class, got {pooling!r}")


def check_class_token(codes: dict[str, Any], pooling: str, asker: object) -> None:
    """Raise ``ConfigError`` when ``class`` is asked of codes (``Encoder.sizes()``) without a prefix token."""
    if pooling == "class" and not codes.get("prefix_tokens"):
        raise ConfigError(
            f"{type(asker).__name__}.pooling is class, but the encoder has no class token: "
            "set its class_token: true, or pooling: mean"
        )


def pooled(codes: Any, pooling: str = "mean") -> Tensor:
    """One vector a sample, [B,D], out of any codes that have one.

    Args:
        codes: Tokens, VectorCodes (``vector`` [B,D]), LatentCodes (``latents`` [B,L,c]) or a bare [B,D].
        pooling: ``mean`` over real content tokens or latents, ``class`` for the first prefix token.

    Raises:
        ConfigError: other codes, another word, or ``class`` of codes without a class token.
    """
    if isinstance(codes, Tokens):
        return codes.pooled(pooling)
    if pooling not in POOLINGS:
        raise ConfigError(f"pooling must be mean or class, got {pooling!r}")
    if pooling == "class":
        raise ConfigError(f"pooling class needs a class token; the encoder gives {type(codes).__name__}: use mean")
    vector, latents = getattr(codes, "vector", None), getattr(codes, "latents", None)
    if isinstance(vector, Tensor):
        return vector
    if isinstance(latents, Tensor):
        return latents.mean(1)
    if isinstance(codes, Tensor) and codes.ndim == 2:
        return codes
    raise ConfigError(f"a vector per sample needs Tokens, VectorCodes or LatentCodes; got {type(codes).__name__}")


def codes_of(encoder: Encoder, batch: Batch, layer: int | None, asker: object) -> Any:
    """The encoder's codes, or the hidden states of one of its layers before the final norm.

    Raises:
        ConfigError: a ``layer`` of an encoder that doesn't offer ``features``.
    """
    if layer is None:
        return encoder(batch)
    inside = encoder.role(TokenEncoder)
    if inside is None or "features" not in inside.capabilities:
        name = type(encoder).__name__
        raise ConfigError(f"{type(asker).__name__}.layer needs 'features'; {name} {encoder.lacks('features')}")
    return inside.features(batch, layer)


def read_tokens(tokens: Tokens) -> tuple[Tensor, Tensor | None]:
    """Prefix and content tokens [B,P+T,D] with their mask, None without padding."""
    if not tokens.padded:
        return tokens.joined(), None
    prefix = tokens.mask.new_ones(len(tokens.mask), tokens.prefix.shape[1])
    return tokens.joined(), torch.cat([prefix, tokens.mask], 1)


# ---- a split's worth
@dataclass
class Features:
    """Features of a split, on the CPU.

    Args:
        values: [N,D], or [N,T,D] tokens.
        index: [N] int64, the place of each sample in its split.
        mask: [N,T] bool, True = real; None when all are.
        label: [N] int64; None without labels.
    """

    values: Tensor
    index: Tensor
    mask: Tensor | None = None
    label: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    def unlabelled(self) -> Features:
        """The same without labels: what a probe is shown of the samples it is judged on."""
        return replace(self, label=None)

    def need_label(self, asker: object) -> Tensor:
        """The labels. Raises ``DataError`` when there are none, or one is negative."""
        if self.label is None:
            raise DataError(f"{type(asker).__name__} reads the field label, which the batches don't have")
        if len(self) and int(self.label.min()) < 0:
            bad = int(self.index[int(self.label.argmin())])
            raise DataError(f"label of sample {bad} is {int(self.label.min())}; classes count from 0")
        return self.label

    @staticmethod
    def join(pieces: list[Features]) -> Features:
        """One after the other, in ``index`` order; tokens are padded to the longest."""
        longest = max(p.values.shape[1] for p in pieces)
        ragged = pieces[0].values.ndim == 3 and any(p.mask is not None or p.values.shape[1] < longest for p in pieces)
        pieces = [p._padded(longest) for p in pieces] if ragged else pieces
        order = torch.argsort(torch.cat([p.index for p in pieces]), stable=True)

        def column(name: str) -> Tensor | None:
            found = [getattr(p, name) for p in pieces]
            return None if any(f is None for f in found) else torch.cat(found)[order]

        values, index = column("values"), column("index")
        assert values is not None and index is not None
        return Features(values, index, column("mask"), column("label"))

    def _padded(self, length: int) -> Features:
        mask = torch.ones(self.values.shape[:2], dtype=torch.bool) if self.mask is None else self.mask
        more = length - self.values.shape[1]
        return replace(self, values=pad(self.values, [0, 0, 0, more]), mask=pad(mask, [0, more]))
