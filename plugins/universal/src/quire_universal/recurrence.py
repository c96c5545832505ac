"""The recurrence in depth: one block, applied until every position has stopped. Pure torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quire.errors import ConfigError
from quire.roles.language.blocks import Source
from quire_universal.block import NORMS, TRANSITIONS, UniversalBlock
from quire_universal.halting import Halt, Halting, Ponder
from quire_universal.sight import Sight, StepCache
from quire_universal.signals import Signals


class Recurrence(nn.Module):
    """Signals, the shared block, and the norm behind the last step.

    Args:
        width, heads, ffn, dropout, norm, transition: Of the block.
        signals: Added before every step.
        causal: Whether a token sees earlier ones only.
        cross: Whether the block attends to a source.
        blocks: 1 shares one block; else a block of its own for each step (the control).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        ffn: int,
        dropout: float,
        norm: str,
        transition: str,
        signals: Signals,
        causal: bool,
        cross: bool,
        blocks: int = 1,
    ) -> None:
        super().__init__()
        self.signals = signals
        self.blocks: Any = nn.ModuleList(
            [UniversalBlock(width, heads, ffn, dropout, norm, transition, causal, cross) for _ in range(blocks)]
        )
        self.norm: nn.Module = nn.LayerNorm(width) if norm == "pre" else nn.Identity()
        for name, parameter in self.blocks.named_parameters():
            if parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        x: Tensor,
        sight: Sight,
        steps: int,
        halting: Halting | None = None,
        source: Source | None = None,
        caches: list[StepCache] | None = None,
        generator: torch.Generator | None = None,
        states: list[Tensor] | None = None,
    ) -> tuple[Tensor, Ponder | None]:
        """Run.

        Args:
            x: [B,T,D] embeddings, without signals.
            sight: What they see.
            steps: R, the most steps.
            halting: When a position stops; None: all take R steps.
            source: What the block attends to besides.
            caches: One a step; every one is filled, whatever the number of steps that the new tokens take.
            generator: Of random halting.
            states: Filled with the state after each step, if given.

        Returns:
            [B,T,D] before the final norm, and what it cost.
        """
        state, halt = x, None if halting is None else Halt(halting, x, sight.real)
        sight.signal = self.signals.at(sight.places, x)
        for t in range(steps):
            cache = None if caches is None else caches[t]
            block = self.blocks[t % len(self.blocks)]
            given = self.signals(state, t + 1, sight.signal)
            if halt is not None and not torch.compiler.is_compiling() and not bool(halt.running.any()):
                if cache is None:
                    break
                if halt.halting.copies and block.local:  # later tokens may run longer and will look here
                    block.remember(given, sight, cache)
                    halt.halting.remember(given, sight, cache)
                    continue
            active = None
            if halt is not None:
                p = halt.halting.probability(given, sight, t + 1, cache, generator)
                weight, active = halt.weigh(p, t + 1 == steps)
            made = block(given, sight, source, cache)
            if halt is not None and active is not None:
                halt.add(made, weight)
                state = torch.where(active[..., None], made, state) if halt.halting.copies else made
            else:
                state = made
            if states is not None:
                states.append(state)
        return (state, None) if halt is None else (halt.out.to(x.dtype), halt.ponder())


def check_shape(
    name: str, width: int, heads: int, ffn: int, steps: int, dropout: float, norm: str, transition: str, position: str
) -> None:
    """Raise ``ConfigError`` for sizes that do not fit and unknown words."""
    if heads < 1 or width % heads:
        raise ConfigError(f"{name} has width={width}, not divisible by heads={heads}")
    if position == "rope" and (width // heads) % 2:
        raise ConfigError(f"{name} with rope needs heads of even width, got {width} / {heads} = {width // heads}")
    if steps < 1 or ffn < 1:
        raise ConfigError(f"{name} needs steps and ffn of at least 1, got {steps} and {ffn}")
    if not 0 <= dropout < 1:
        raise ConfigError(f"{name}.dropout must be in [0, 1), got {dropout}")
    if norm not in NORMS or transition not in TRANSITIONS:
        raise ConfigError(f"{name}.norm is pre or post, transition is ffn or sepconv; got {norm!r} and {transition!r}")
