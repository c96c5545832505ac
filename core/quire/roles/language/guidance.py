"""Guidance: the same tokens read with and without their condition, and the logits in between or beyond."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from quire.contracts import Batch, Codes
from quire.errors import ConfigError
from quire.roles.language.contract import Caps, DecodeState, StepModel


@dataclass
class ClassCodes(Codes):
    """The condition of a model with a class in its first place.

    Attributes:
        label: [B] int64 class ids; the number of classes stands for none.
    """

    label: Tensor

    @classmethod
    def of(cls, batch: Batch, classes: int) -> ClassCodes | None:
        """The batch's ``label``, checked; None where it has none. Raises ``ConfigError`` for a class that is not."""
        label = batch.get("label")
        if label is None:
            return None
        outside = label[(label < 0) | (label > classes)]
        if len(outside):
            raise ConfigError(
                f"label {int(outside[0])} in a model with classes 0..{classes - 1}, and {classes} for none"
            )
        return cls(label)


@dataclass
class Pair:
    """A guided state's cache: with the condition, without it, and the ids that the latter has not read yet."""

    given: DecodeState
    free: DecodeState | None
    late: list[Tensor] = field(default_factory=list)
    number: int = 0


class Guided(StepModel):
    """A view of a step model whose logits are u + scale (c - u): c with the condition, u without it.

    Args:
        target: The model.
        scale: 1 is the conditional model, 0 the unconditional one.
        interval: First and last (exclusive) number of the new tokens that are guided; others cost one pass.
        unconditional: Ids of a prompt that stands for no condition; None asks the model for its own.
    """

    def __init__(
        self, target: StepModel, scale: float, interval: tuple[float, float], unconditional: list[int] | None
    ) -> None:
        super().__init__()
        self.target, self.scale, self.interval, self.unconditional = target, scale, interval, unconditional

    def caps(self) -> Caps:
        """The model's, without drafts and embeddings; a longer unconditional prompt takes from the positions."""
        caps = self.target.caps()
        wrong = [i for i in self.unconditional or [] if not 0 <= i < caps.vocab_size]
        if wrong:
            raise ConfigError(f"Sample.unconditional holds id {wrong[0]}; the model has {caps.vocab_size} tokens")
        most = None if caps.positions_max is None else caps.positions_max - len(self.unconditional or [0]) + 1
        return replace(caps, embeds=False, tree_mask=False, gather=False, positions_max=most)

    def open(
        self, prompt: Tensor, mask: Tensor | None = None, codes: Codes | None = None, max_length: int | None = None
    ) -> DecodeState:
        """Read the prompts, and what stands for no condition if any token is guided."""
        given, free = self.target.open(prompt, mask, codes, max_length), None
        if self.interval[1] > 0:
            none = self.target.without_condition(codes, len(prompt)) if self.unconditional is None else codes
            if self.unconditional is None:
                free = self.target.open(prompt, mask, none, max_length)
            else:
                blank = torch.tensor([self.unconditional], device=prompt.device).expand(len(prompt), -1)
                room = None if max_length is None else max_length + blank.shape[1]
                free = self.target.open(blank, None, none, room)
        pair = Pair(given, free)
        mixed = given.logits if free is None or self.interval[0] > 0 else self._mix(given.logits, free.logits)
        state = DecodeState(given.lengths, mixed, pair)
        self._note(state, 1, prompt.numel())
        return state

    def step(
        self,
        state: DecodeState,
        ids: Tensor | None,
        embeds: Tensor | None = None,
        parents: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """One certain token a row; the unconditional side reads it when its logits are needed."""
        assert ids is not None
        assert ids.shape[1] == 1
        pair: Pair = state.cache
        logits, passes, slots = self.target.step(pair.given, ids), 1, ids.numel()
        pair.number += 1
        if pair.free is not None and pair.number < self.interval[1]:
            pair.late.append(ids)
            if pair.number >= self.interval[0]:
                late = torch.cat(pair.late, 1)
                free = self.target.step(pair.free, late)[:, -1:]
                self.target.keep(pair.free, torch.arange(late.shape[1]).expand(len(late), -1))
                pair.late, passes, slots = [], 2, slots + late.numel()
                logits = self._mix(logits, free)
        else:
            pair.free, pair.late = None, []
        self._note(state, passes, slots)
        return logits

    def keep(self, state: DecodeState, chosen: Tensor) -> None:
        """The certain token."""
        self.target.keep(state.cache.given, chosen)
        state.lengths = state.cache.given.lengths

    def rows(self, state: DecodeState, order: Tensor) -> None:
        """Select rows of both sides."""
        pair: Pair = state.cache
        for side in (pair.given, pair.free):
            if side is not None:
                self.target.rows(side, order)
        pair.late = [ids[order] for ids in pair.late]
        state.lengths, state.logits = pair.given.lengths, state.logits[order]

    def _mix(self, given: Tensor, free: Tensor) -> Tensor:
        return free + self.scale * (given - free)

    def _note(self, state: DecodeState, passes: int, slots: int) -> None:
        sides: list[Any] = [s for s in (state.cache.given, state.cache.free) if s is not None]
        for name in ("cache_bytes", "layers_used"):
            state.extras[name] = sum(s.extras.get(name, 0) for s in sides)
        state.extras.update(passes=passes, slots=slots)


def check_guidance(cfg: float, interval: list[int] | None, unconditional: list[int] | None) -> None:
    """Raise ``ConfigError`` for arguments of ``Sample`` that say nothing sensible."""
    if not (math.isfinite(cfg) and cfg >= 0):
        raise ConfigError(f"Sample.cfg must be a number of at least 0, got {cfg:g}")
    if interval is not None and (len(interval) != 2 or not 0 <= interval[0] < interval[1]):
        raise ConfigError(f"Sample.cfg_interval is [first, last) of the new tokens, counted from 0; got {interval}")
    if unconditional is not None and not unconditional:
        raise ConfigError("Sample.unconditional must hold at least one id; null uses the model's null class")
