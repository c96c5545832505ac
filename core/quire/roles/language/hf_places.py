"""How explicit positions reach a transformers model: an argument, a learned table, or a relative bias."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding


class Places:
    """Tell one pass the positions of its slots. The plain kind: the model takes ``position_ids``."""

    def arguments(self, places: Tensor) -> dict[str, Tensor]:
        """Keyword arguments of the forward call; ``places`` [B,Q]."""
        return {"position_ids": places}

    @contextlib.contextmanager
    def given(self, places: Tensor, keys: Tensor) -> Iterator[None]:
        """Around the forward call: positions of the new slots [B,Q] and of all slots [B,S]."""
        yield


class TablePlaces(Places):
    """The decoder looks positions up in a table and counts them itself (BART, Marian, Pegasus).

    Args:
        table: The table, whose result is replaced while a pass has positions of its own.
    """

    def __init__(self, table: nn.Embedding) -> None:
        self.table = table

    def arguments(self, places: Tensor) -> dict[str, Tensor]:
        """None: the table is told instead."""
        return {}

    @contextlib.contextmanager
    def given(self, places: Tensor, keys: Tensor) -> Iterator[None]:
        """Look up ``places`` in place of what the decoder counts."""

        def look(table: Any, args: Any, out: Any) -> Tensor:
            return embedding(places + getattr(table, "offset", 0), table.weight)

        handle = self.table.register_forward_hook(look)
        try:
            yield
        finally:
            handle.remove()


class BiasPlaces(Places):
    """Attention adds a learned bias of the distance between two slots (T5 and its kin).

    Args:
        attentions: The self-attentions that own such a bias.
    """

    def __init__(self, attentions: list[Any]) -> None:
        self.attentions = attentions

    def arguments(self, places: Tensor) -> dict[str, Tensor]:
        """None: the bias is told instead."""
        return {}

    @contextlib.contextmanager
    def given(self, places: Tensor, keys: Tensor) -> Iterator[None]:
        """Measure distances by ``places`` and ``keys`` in place of slot numbers."""
        distance = keys[:, None, :] - places[:, :, None]
        for attention in self.attentions:
            attention.compute_bias = _bias(attention, distance)
        try:
            yield
        finally:
            for attention in self.attentions:
                del attention.compute_bias


def _bias(attention: Any, distance: Tensor) -> Any:
    def compute_bias(*args: Any, **kwargs: Any) -> Tensor:
        bucket = attention._relative_position_bucket(
            distance,
            bidirectional=False,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        return attention.relative_attention_bias(bucket).permute(0, 3, 1, 2)  # [B,H,Q,S]

    return compute_bias


def places_of(decoder: nn.Module, config: Any, parameters: Any) -> Places | None:
    """How positions are given to this decoder; None when nothing is known that would work.

    Args:
        decoder: The module without its head.
        config: Its config.
        parameters: Names that the whole model's forward takes.
    """
    if getattr(config, "alibi", False) or "local" in str(getattr(config, "attention_layers", "")):
        return None  # distances or windows are counted in slots, inside the attention
    owners = [m for m in decoder.modules() if getattr(m, "has_relative_attention_bias", False)]
    if owners:
        return BiasPlaces(owners) if all(hasattr(m, "compute_bias") for m in owners) else None
    if "position_ids" in parameters:
        return Places()
    table = getattr(decoder, "embed_positions", None)
    return TablePlaces(table) if isinstance(table, nn.Embedding) else None


def seen_slots(
    lengths: Tensor, places: Tensor, slots: int, ancestors: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Which slots each new slot sees, and every slot's position.

    Args:
        lengths: [B] slots kept; row b's new slots are ``lengths[b]`` and the Q-1 after it.
        places: [B,Q] positions of the new slots.
        slots: S.
        ancestors: [B or 1,Q,Q] bool, ancestors and self of each new slot; None for a chain.
        valid: [B,Q] bool; False slots are seen by themselves alone.

    Returns:
        [B,Q,S] bool and [B,S] int64.
    """
    device, width = lengths.device, places.shape[1]
    at = torch.arange(slots, device=device)[None] - lengths[:, None]  # the new slots are 0..Q-1
    new = (at >= 0) & (at < width)
    inside = at.clamp(0, width - 1)
    own = inside[:, None, :] == torch.arange(width, device=device)[None, :, None]
    if ancestors is None:
        among = inside[:, None, :] <= torch.arange(width, device=device)[None, :, None]
    else:
        among = ancestors.expand(len(lengths), -1, -1).gather(2, inside[:, None, :].expand(-1, width, -1))
    if valid is not None:
        among = (among & valid.to(device).gather(1, inside)[:, None, :]) | own
    keys = torch.where(new, places.gather(1, inside), torch.arange(slots, device=device)[None])
    return (at < 0)[:, None, :] | (among & new[:, None, :]), keys


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """[B,Q,S] bool → [B,1,Q,S], 0 where seen and the least number where not."""
    least = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, least)[:, None]
