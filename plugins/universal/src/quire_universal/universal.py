"""What encoder and decoder share: the shape of the recurrence, its random starts and its halting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quire.contracts import Component, Spec, build
from quire.errors import ConfigError
from quire_universal.halting import Halting
from quire_universal.recurrence import Recurrence, check_shape
from quire_universal.signals import Signals, check_signals


class Universal(Component):
    """Base of both sides: one block, applied again and again. Dehghani et al. 2018.

    Args:
        width: D, even with sinusoids, divisible by heads.
        heads: Attention heads.
        ffn: Hidden width of the transition.
        steps: R, times the block runs; with ``halting`` its ``max_steps`` counts instead.
        dropout: On sublayers and attention, in [0, 1).
        norm: ``pre`` (and a final norm; the official code's) or ``post`` (the paper's).
        transition: ``ffn``, or ``sepconv``: separable convolutions of kernels 3 and 5 over the tokens, in a decoder
            over earlier ones.
        position: ``coordinate`` (sinusoids added at every step), ``random_offset`` (the same, from a random start in
            training, from 0 otherwise), ``rope``, ``learned``, or ``none``.
        step_signal: ``learned``, one vector a step, or ``sinusoid``.
        halting: When a position stops, ``ACT`` for one; null: all take R steps.
        layout: Of sinusoids: ``interleaved`` sines and cosines (paper) or ``halves`` (code).
        max_offset: Largest random start, in tokens.
        shared: False gives every step a block of its own: the plain transformer, as a control.

    Raises:
        ConfigError: sizes that do not fit, unknown words.
    """

    def __init__(
        self,
        width: int = 512,
        heads: int = 8,
        ffn: int = 2048,
        steps: int = 6,
        dropout: float = 0.1,
        norm: str = "pre",
        transition: str = "ffn",
        position: str = "coordinate",
        step_signal: str = "learned",
        halting: Halting | None = None,
        layout: str = "interleaved",
        max_offset: int = 100,
        shared: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_shape(name, width, heads, ffn, steps, dropout, norm, transition, position)
        check_signals(name, width, position, step_signal, layout)
        if max_offset < 0:
            raise ConfigError(f"{name}.max_offset must be at least 0, got {max_offset}")
        self.width, self.heads, self.ffn, self.dropout, self.norm_kind = width, heads, ffn, dropout, norm
        self.transition, self.position, self.step_signal, self.order = transition, position, step_signal, layout
        self.max_offset, self.shared, self.halting = max_offset, shared, halting
        self.steps = steps if halting is None else halting.max_steps

    def recurrence(self, length: int, causal: bool, cross: bool) -> Recurrence:
        """Signals and block, with ``length`` learned positions where positions are learned."""
        return Recurrence(
            self.width,
            self.heads,
            self.ffn,
            self.dropout,
            self.norm_kind,
            self.transition,
            Signals(self.width, self.position, self.step_signal, self.order, self.steps, length),
            causal=causal,
            cross=cross,
            blocks=1 if self.shared else self.steps,
        )

    def build_halting(self, spec: Spec) -> None:
        """The halting rule, if there is one, for states of this width."""
        if self.halting is not None:
            build(self.halting, Spec({**spec, "width": self.width}))

    def embedding(self, vocab_size: int) -> nn.Embedding:
        """A table whose rows have a length of about 1."""
        table = nn.Embedding(vocab_size, self.width)
        nn.init.normal_(table.weight, std=self.width**-0.5)
        return table

    def bind(self, model: Any) -> None:
        """The model's generator draws offsets."""
        super().bind(model)
        self.refer("_source_of_chance", model.generator)

    def chance(self, device: torch.device) -> torch.Generator | None:
        """The model's generator in training, where there is a model; else None."""
        make = self.__dict__.get("_source_of_chance")
        return make(device) if make is not None and self.training else None

    def offsets(self, rows: int, device: torch.device, generator: torch.Generator | None) -> Tensor | int:
        """A random start [B,1] for each row in training with ``random_offset``, else 0."""
        if self.position != "random_offset" or not self.training:
            return 0
        return torch.randint(0, self.max_offset + 1, (rows, 1), device=device, generator=generator)

    def turns(self, places: Tensor, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rotary cosines and sines [B or 1,1,T,Dh/2] of ``rope``; else None."""
        if self.position != "rope":
            return None
        half = self.width // self.heads // 2
        rates = 10000.0 ** (-torch.arange(half, device=places.device, dtype=torch.float32) / half)
        angles = places[:, None, :, None].float() * rates
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)
