"""The tokens contract: where tokens sit (Layout), what they hold (Tokens), who makes them (TokenEncoder)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from quire.contracts import Batch, Codes, Decoder, Encoder, Spec
from quire.errors import ConfigError
from quire.roles.tokens.subset import Subset, check_index, check_real, equal_counts, gather, indices

__all__ = [
    "POSITIONS",
    "Layout",
    "Segment",
    "Subset",
    "TokenEncoder",
    "Tokens",
    "check_index",
    "check_real",
    "equal_counts",
    "gather",
    "indices",
]

POSITIONS = ("none", "sincos", "learned")


class Segment(NamedTuple):
    """One regular grid of tokens cut from one batch field.

    Args:
        name: Name of the segment, the modality for one.
        grid: Cells per axis: ``(H, W)`` patches, ``(T,)`` frames or words, ``(F, H, W)`` video patches.
        patch: Size of a cell per axis, in the field's unit: pixels, frames, words.
        field: Batch field that it is cut from.
        start: Index of its first cell in the whole layout.
    """

    name: str
    grid: tuple[int, ...]
    patch: tuple[int, ...]
    field: str
    start: int = 0

    @property
    def cells(self) -> int:
        """Number of cells."""
        return math.prod(self.grid)

    @property
    def stop(self) -> int:
        """Index after its last cell."""
        return self.start + self.cells


class Layout(NamedTuple):  # not a frozen dataclass: Lightning walks through what predict returns and refuses those
    """The places of all N tokens: segments one after the other, each in row-major order. Hashable plain data."""

    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, *segments: Segment) -> Layout:
        """A layout of ``segments`` in this order; their ``start`` is set here."""
        placed, start = [], 0
        for segment in segments:
            placed.append(segment._replace(start=start))
            start += segment.cells
        return cls(tuple(placed))

    @classmethod
    def read(cls, plain: Sequence[Mapping[str, Any]]) -> Layout:
        """The layout that ``plain()`` wrote."""
        return cls.of(*(Segment(s["name"], tuple(s["grid"]), tuple(s["patch"]), s["field"]) for s in plain))

    def plain(self) -> list[dict[str, Any]]:
        """Lists and dicts only, for a spec or a checkpoint."""
        return [{"name": s.name, "grid": list(s.grid), "patch": list(s.patch), "field": s.field} for s in self.segments]

    @property
    def cells(self) -> int:
        """Number of cells, N."""
        return sum(s.cells for s in self.segments)

    @property
    def grid(self) -> tuple[int, ...]:
        """Grid of the only segment. Raises ``ConfigError`` when there are several."""
        return self.only().grid

    @property
    def coordinates(self) -> Tensor:
        """[N,3] int64 as (frame, row, column); a 1-D segment counts along the first, a 2-D one along the last two."""
        return torch.cat([_coordinates(s.grid) for s in self.segments])

    @property
    def segment_id(self) -> Tensor:
        """[N] int64, the segment of each cell."""
        return torch.cat([torch.full((s.cells,), i) for i, s in enumerate(self.segments)])

    def only(self) -> Segment:
        """The one segment. Raises ``ConfigError`` when there are several."""
        if len(self.segments) != 1:
            names = ", ".join(s.name for s in self.segments)
            raise ConfigError(f"one segment of tokens is needed, the layout has {len(self.segments)}: {names}")
        return self.segments[0]


def _coordinates(grid: tuple[int, ...]) -> Tensor:
    axes = torch.cartesian_prod(*(torch.arange(n) for n in grid)).reshape(-1, len(grid))
    full = torch.zeros(len(axes), 3, dtype=torch.long)
    if len(grid) == 1:
        full[:, 0] = axes[:, 0]
    else:
        full[:, 3 - len(grid) :] = axes
    return full


@dataclass
class Tokens(Codes):
    """Content tokens with their places, and prefix tokens apart.

    Args:
        values: [B,T,D] float.
        index: [B,T] int64, the cell of each token in ``layout``; prefix tokens have none.
        layout: Places of all N cells, also of those that aren't here.
        mask: [B,T] bool, True = real; all real when it isn't given.
        prefix: [B,P,D] class or global tokens; P = 0 when it isn't given.
        padded: Whether some token may be padding; worked out from ``mask`` when it isn't given.
    """

    values: Tensor
    index: Tensor
    layout: Layout
    mask: Tensor = None  # type: ignore[assignment]
    prefix: Tensor = None  # type: ignore[assignment]
    padded: bool = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.mask is None:
            self.mask = torch.ones(self.values.shape[:2], dtype=torch.bool, device=self.values.device)
            self.padded = False
        if self.padded is None:
            # asking the GPU would wait for it: there a given mask counts as padding
            self.padded = self.mask.is_cuda or not bool(self.mask.all())
        if self.prefix is None:
            self.prefix = self.values.new_zeros(len(self.values), 0, self.values.shape[-1])

    def with_values(self, values: Tensor, prefix: Tensor | None = None) -> Tokens:
        """The same places with other contents."""
        return replace(self, values=values, prefix=self.prefix if prefix is None else prefix)

    def take(self, keep: Tensor) -> Tokens:
        """Only the tokens at ``keep`` [B,K], in that order; the prefix stays."""
        return replace(
            self,
            values=gather(self.values, keep),
            index=self.index.gather(1, keep),
            mask=self.mask.gather(1, keep),
            padded=self.padded,
        )

    def joined(self) -> Tensor:
        """[B,P+T,D]: prefix tokens, then content tokens."""
        return torch.cat([self.prefix, self.values], 1) if self.prefix.shape[1] else self.values

    def pooled(self, pooling: str = "mean") -> Tensor:
        """One vector per sample, [B,D].

        Args:
            pooling: ``mean`` over real content tokens, or ``class`` for the first prefix token.

        Raises:
            ConfigError: another word, or ``class`` without prefix tokens.
        """
        if pooling == "class":
            if not self.prefix.shape[1]:
                raise ConfigError("pooling 'class' needs a class token; set class_token: true or pooling: mean")
            return self.prefix[:, 0]
        if pooling != "mean":
            raise ConfigError(f"pooling must be mean or class, got {pooling!r}")
        if not self.padded:
            return self.values.mean(1)
        weight = self.mask.unsqueeze(-1).to(self.values.dtype)
        return (self.values * weight).sum(1) / weight.sum(1).clamp(min=1)


class CellDecoder(Decoder):
    """Tokens → values or classes for every cell, [B,N,F], or one such map a task."""

    advice: ClassVar[str] = "set one that predicts cells, such as GridDecoder"


class TokenEncoder(Encoder):
    """batch → Tokens: cuts data into tokens with known places and runs attention over all or some of them.

    Attributes:
        width: D.
        prefix_tokens: P, class and global tokens; they have no place and no index.
        positions: ``none``, ``sincos`` or ``learned``: what ``embed`` adds.
        capabilities: Some of ``subset`` (takes ``keep``), ``context`` (takes ``context``), ``features`` (hidden
            states by layer), ``lm_head`` (has ``logits`` over a vocabulary), ``grid`` (its cells are rows and columns).
    """

    width: int
    prefix_tokens: int = 0
    positions: str = "none"
    vocabulary: ClassVar[tuple[str, ...]] = ("subset", "context", "features", "lm_head", "grid")

    def lacks(self, capability: str) -> str:
        """Says what the cells are when a grid is asked."""
        return "has its cells in one row, not on a grid" if capability == "grid" else super().lacks(capability)

    def layout(self, source: Batch | Spec) -> Layout:
        """Places of the tokens of a batch, or of the data that a spec describes.

        Raises:
            ConfigError: a size that the patches don't divide.
        """
        raise NotImplementedError

    def token_mask(self, batch: Batch) -> Tensor | None:
        """[B,N] bool, True = real; None when the batch has no padding at all."""
        return None

    def embed(self, batch: Batch) -> Tokens:
        """All N tokens in cell order before the trunk; positions are added here, once, or nowhere."""
        raise NotImplementedError

    def encode(
        self,
        tokens: Tokens,
        keep: Subset | Tensor | None = None,
        context: Subset | Tensor | None = None,
        context_update: bool = True,
    ) -> Tokens:
        """Run the trunk.

        Args:
            tokens: What ``embed`` gave.
            keep: The tokens that enter, [B,K]; the others are dropped before the trunk. A Subset's ``keep`` is
                trusted, a bare tensor is checked.
            context: The tokens that are keys and values in every layer, [B,M]; all tokens are queries. With ``keep``
                it counts among the kept tokens. Prefix tokens are always in it.
            context_update: Whether keys and values come from each layer's own input (True) or, in all layers,
                from the embedded tokens (False).

        Returns:
            Tokens after the final norm: [B,K,D] with ``keep``, else [B,N,D].
        """
        raise NotImplementedError

    def forward(
        self,
        batch: Batch,
        keep: Subset | Tensor | None = None,
        context: Subset | Tensor | None = None,
        context_update: bool = True,
    ) -> Tokens:
        """``embed`` then ``encode``; an encoder may embed the kept tokens only."""
        return self.encode(self.embed(batch), keep, context, context_update)

    def features(self, batch: Batch, layer: int = -1) -> Tokens:
        """Hidden states before the final norm.

        Args:
            batch: As in ``forward``.
            layer: 0 is what ``embed`` gave, l what block l returned, -1 the last block.
        """
        raise NotImplementedError

    def attach_positions(self, kind: str, init: str = "zeros", std: float = 0.02) -> None:
        """Give a position-free encoder positions, before or after it is built; a checkpoint made later has them.

        Args:
            kind: ``learned`` or ``sincos``.
            init: Start of a learned table: ``zeros`` or ``normal``; the sincos table is fixed.
            std: Standard deviation of ``normal``.

        Raises:
            ConfigError: another word, or an encoder that has other positions already.
        """
        raise NotImplementedError

    def sizes(self) -> dict[str, Any]:
        """``width``, ``cells`` (N), ``grid`` (one segment only), ``segments``, ``prefix_tokens``."""
        layout: Layout = self.built_layout
        made: dict[str, Any] = {"width": self.width, "cells": layout.cells, "segments": layout.plain()}
        if len(layout.segments) == 1:
            made["grid"] = list(layout.grid)
        return {**made, "prefix_tokens": self.prefix_tokens}

    @property
    def built_layout(self) -> Layout:
        """The layout that it was built for."""
        return self.layout(Spec(self.__dict__["built_with"]))


def layer_number(layer: int, depth: int, name: str) -> int:
    """Blocks behind which ``features`` reads, 0 to ``depth``; -1 is the last. Raises ``ConfigError`` beyond them."""
    if not -depth - 1 <= layer <= depth:
        raise ConfigError(f"features has layer {layer}; {name} has layers 0..{depth}")
    return layer if layer >= 0 else depth + 1 + layer
