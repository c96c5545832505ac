"""transformers caches that decoding can cut: every token's own slot, or a sliding window that remembers a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from quire.errors import ConfigError


class Aim:
    """Where the next pass writes; one object shared by all layers.

    Attributes:
        where: First slot to write, common to all rows, or slots [B,Q].
        length: Slots held by the longest row; what the model is told, whichever layers it runs.
        room: Slots made when a layer first writes.
        changed: Whether a layer has changed its size since the memory was last counted.
    """

    def __init__(self, room: int) -> None:
        self.where: int | Tensor = 0
        self.length = 0
        self.room = room
        self.changed = True


class SlotLayer(DynamicLayer):
    """One layer's keys and values in preallocated slots: row b's token s in slot s. Doubled when full."""

    def __init__(self, aim: Aim) -> None:
        super().__init__()
        self.aim = aim
        self.held: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write Q slots [B,H,Q,Dh] where the aim says; returns everything up to the last written slot."""
        where, width = self.aim.where, key_states.shape[2]
        slots = self.aim.length + width
        if not self.held or slots > self.held[0].shape[2]:
            self._grow((key_states, value_states), slots)
        for held, new in zip(self.held, (key_states, value_states)):
            if isinstance(where, int):
                held.narrow(2, where, width).copy_(new)
            else:
                held[_rows(where), :, where] = new.transpose(1, 2)
        self.keys, self.values = (held.narrow(2, 0, slots) for held in self.held)
        return self.keys, self.values

    def _grow(self, like: tuple[Tensor, Tensor], slots: int) -> None:
        if not self.held:
            room = max(self.aim.room, slots)
            self.held = [t.new_zeros(*t.shape[:2], room, t.shape[3]) for t in like]
        else:
            more = max(slots, 2 * self.held[0].shape[2]) - self.held[0].shape[2]
            self.held = [torch.cat([t, t.new_zeros(*t.shape[:2], more, t.shape[3])], 2) for t in self.held]
        self.is_initialized = self.aim.changed = True

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots ``source`` [B,Q] to ``target`` [B,Q], row by row."""
        for held in self.held:
            held[_rows(target), :, target] = held[_rows(source), :, source]

    def select(self, order: Tensor) -> None:
        """Select rows."""
        self.held = [held[order] for held in self.held]
        self.aim.changed = True

    def get_seq_length(self) -> int:
        """The common length, so that a model that asks a layer that never ran is told the truth."""
        return self.aim.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys seen by a query, and the first of them."""
        return self.aim.length + query_length, 0


class SlotStore:
    """A full-length cache: rows of different lengths, trees and any subset of the last step's slots.

    Args:
        config: The decoder's config.
        room: Slots to make at first.
        crosses: Whether the model also attends to a source.
    """

    def __init__(self, config: Any, room: int, crosses: bool) -> None:
        self.aim, self._bytes = Aim(room), 0
        own = DynamicCache(config=config)
        self.layers = [SlotLayer(self.aim) for _ in own.layers]
        made = iter(self.layers)
        own.layers = [next(made) if isinstance(layer, DynamicLayer) else layer for layer in own.layers]
        self.cross = DynamicCache() if crosses else None
        self.hf: Cache = own if self.cross is None else EncoderDecoderCache(own, self.cross)

    def point(self, counts: list[int], lengths: Tensor, width: int) -> None:
        """Say where the next ``width`` slots of each row go."""
        self.aim.length = max(counts)
        even = min(counts) == self.aim.length
        self.aim.where = counts[0] if even else lengths[:, None] + torch.arange(width, device=lengths.device)

    def keep(self, counts: list[int], lengths: Tensor, picked: list[list[int]], width: int) -> None:
        """Move the picked ones of the last ``width`` slots behind the kept ones; a prefix needs no move."""
        if all(row == list(range(len(row))) for row in picked):
            return
        most = max(len(row) for row in picked)
        filled = torch.tensor([row + list(range(len(row), most)) for row in picked], device=lengths.device)
        target = lengths[:, None] + torch.arange(most, device=lengths.device)
        for layer in self.layers:
            layer.move(lengths[:, None] + filled, target)

    def cut(self, counts: list[int], wanted: list[int]) -> None:
        """Slots beyond are overwritten later."""

    def rows(self, order: Tensor) -> None:
        """Select rows; cross-attention keys are never touched otherwise."""
        for layer in self.layers:
            layer.select(order)
        if self.cross is not None:
            self.cross.batch_select_indices(order)

    @property
    def bytes(self) -> int:
        """Memory held."""
        if self.aim.changed:
            own = sum(t.numel() * t.element_size() for layer in self.layers for t in layer.held)
            self._bytes = own + (0 if self.cross is None else _bytes(self.cross.layers))
            self.aim.changed = False
        return self._bytes


class WindowStore:
    """A cache of the sliding window alone: chains only, and rows of one length.

    Args:
        config: The decoder's config.
        window: Its sliding window, in tokens.
    """

    def __init__(self, config: Any, window: int) -> None:
        self.hf: Cache = DynamicCache(config=config)
        self.window = window
        self.recording = False

    def point(self, counts: list[int], lengths: Tensor, width: int) -> None:
        """Remember what this step pushes out of the window until ``keep`` has decided."""
        if counts[0] and not self.recording:  # after the prefill, which may drop what no later token can see
            self.hf.activate_past_recording()
            self.recording = True

    def keep(self, counts: list[int], lengths: Tensor, picked: list[list[int]], width: int) -> None:
        """Forget the slots behind the kept prefix."""
        if any(row != list(range(len(picked[0]))) for row in picked):
            raise ConfigError(f"tree drafts need full-length cache; window is {self.window}")
        self.hf.crop(len(picked[0]) - width)

    def cut(self, counts: list[int], wanted: list[int]) -> None:
        """Possible while nothing has left the window."""
        if wanted != counts and counts[0] >= self.window:
            raise ConfigError(f"cutting tokens back needs full-length cache; window is {self.window}")
        self.hf.crop(wanted[0] - counts[0])

    def rows(self, order: Tensor) -> None:
        """Select rows."""
        self.hf.batch_select_indices(order)

    @property
    def bytes(self) -> int:
        """Memory held."""
        return _bytes(self.hf.layers)


def windows_of(config: Any, name: str) -> dict[str, int | None]:
    """Attention kinds of a decoder's layers and their windows, ``{"full_attention": None}`` for most.

    Raises:
        ConfigError: layers whose memory can't be cut back.
    """
    kinds: dict[str, int | None] = {}
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    for layer in DynamicCache(config=config).layers:
        plain = isinstance(layer, DynamicLayer)
        known = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        if chunked or (plain and not known) or hasattr(layer, "conv_states"):
            raise ConfigError(f"{name} needs a croppable cache; {config.model_type} has {type(layer).__name__} layers")
        if isinstance(layer, DynamicSlidingWindowLayer):
            window = int(layer.sliding_window)
            if kinds.setdefault("sliding_attention", window) != window:
                raise ConfigError(f"{name}: layers with different windows are not supported, as in {config.model_type}")
        elif plain:
            kinds["full_attention"] = None
    return kinds


def _rows(places: Tensor) -> Tensor:
    return torch.arange(len(places), device=places.device)[:, None]


def _bytes(layers: list[Any]) -> int:
    tensors = [t for layer in layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)
