"""What the tokens of one pass see, and what a decoder keeps of them for later ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Sight:
    """One pass, the same for every step of the recurrence.

    Attributes:
        places: [B or 1,T] int64 position of each token, as the signals see it.
        mask: [B or 1,1,T or 1,S] bool, True = seen; None: all, or with ``causal`` all up to oneself.
        causal: Whether None means causal.
        real: [B,T] bool, False for padding, which never runs; None without padding.
        where: First slot to write in a cache, or [B,T] slots.
        slots: S, slots read from a cache.
        taps: [B or 1,T,K] slots of a token's last K ancestors, nearest first, -1 for none; for convolutions.
        signal: Position signals of the pass.
        turn: Rotary cosines and sines [B or 1,1,T,Dh/2].
        frozen: [B,T,D] tokens that give keys and values at every step, in place of the state.
    """

    places: Tensor
    mask: Tensor | None = None
    causal: bool = False
    real: Tensor | None = None
    where: int | Tensor = 0
    slots: int = 0
    taps: Tensor | None = None
    signal: Tensor | None = None
    turn: tuple[Tensor, Tensor] | None = None
    frozen: Tensor | None = None

    def seen(self, rows: int, columns: int) -> Tensor:
        """[B or 1,T or 1,S] bool."""
        if self.mask is not None:
            return self.mask[:, 0, :, :columns]
        whole = torch.ones(1, rows, columns, dtype=torch.bool, device=self.places.device)
        return whole.tril() if self.causal else whole


class StepCache:
    """What one step of the recurrence keeps of each token: named tensors [B,S,…]. Doubled when full."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.held: dict[str, Tensor] = {}

    def put(self, name: str, values: Tensor, sight: Sight) -> Tensor:
        """Write T new tokens [B,T,…] and give back all slots of the pass, [B,S,…]."""
        if name not in self.held:
            self.held[name] = values.new_zeros(len(values), self.slots, *values.shape[2:])
        held = self.held[name].to(values.dtype)
        if isinstance(sight.where, int):
            held[:, sight.where : sight.where + values.shape[1]] = values
        else:
            held[torch.arange(len(values), device=values.device)[:, None], sight.where] = values
        self.held[name] = held
        return held[:, : sight.slots]

    def grow(self, slots: int) -> None:
        """Make room for ``slots`` slots."""
        if slots > self.slots:
            more = max(slots, 2 * self.slots) - self.slots
            self.held = {k: torch.cat([v, v.new_zeros(len(v), more, *v.shape[2:])], 1) for k, v in self.held.items()}
            self.slots += more

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots ``source`` [B,Q] to ``target`` [B,Q], row by row."""
        row = torch.arange(len(source), device=source.device)[:, None]
        for values in self.held.values():
            values[row, target] = values[row, source]

    def rows(self, order: Tensor) -> None:
        """Select rows."""
        self.held = {k: v[order] for k, v in self.held.items()}

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(v.numel() * v.element_size() for v in self.held.values())
