"""One pass through gated layers: asking the routers on the way, or following a routing that is given."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from quire.errors import ConfigError, DataError
from quire.roles.language.contract import DecodeState
from quire_first.gates import Gate
from quire_first.routing import Decision, Routers, Routing


class Deciding:
    """Asks each layer's router, which sees what earlier skips have left.

    Args:
        routers: Whom to ask.
        learning: Gates carry the routers' gradients; every layer is computed.
        generator: Of gumbel's noise.

    Attributes:
        prompt: [B,T] bool, the tokens that count.
        full: Run every layer, whatever is decided; those that no row needs write nothing.
        vote: One decision for all rows, by their mean.
    """

    def __init__(self, routers: Routers, learning: bool, generator: torch.Generator | None = None) -> None:
        self.routers, self.learning, self.generator = routers, learning, generator
        self.prompt: Tensor | None = None
        self.source: Tensor | None = None
        self.full = self.vote = False
        self.made: dict[int, Decision] = {}

    def read(self, values: Tensor, mask: Tensor | None) -> None:
        """Decide from the source's codes [B,S,D] in place of what the layers are given."""
        self.source = values
        self.prompt = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device) if mask is None else mask

    def __call__(self, gate: Gate, x: Tensor, args: tuple, kwargs: dict) -> Any:
        """Decide on this layer, then run it or go round it."""
        assert self.prompt is not None
        seen = x if self.source is None else self.source
        decision = self.routers.decide(gate.index, seen, self.prompt, self.learning, self.generator)
        if self.vote:
            decision.on = (decision.rho.mean() >= self.routers.threshold).expand(len(x))
        self.made[gate.index] = decision
        if decision.gate is not None:
            return gate.change(gate.through(x, args, kwargs), lambda made: self.routers.mixed(decision, x, made))
        return follow(gate, decision.on, self.full, x, args, kwargs)

    def routing(self, depth: int) -> Routing:
        """What was decided; protected layers run with probability 1."""
        like = next(iter(self.made.values()))
        rho = [self.made[i].rho if i in self.made else torch.ones_like(like.rho) for i in range(depth)]
        on = [self.made[i].on if i in self.made else torch.ones_like(like.on) for i in range(depth)]
        return Routing(torch.stack(rho, 1), torch.stack(on, 1))


class Given:
    """Follows a routing.

    Args:
        on: [B,N] bool.
        full: Run every layer all the same; those that no row needs write nothing.
    """

    def __init__(self, on: Tensor, full: bool = False) -> None:
        self.on, self.full = on, full

    def __call__(self, gate: Gate, x: Tensor, args: tuple, kwargs: dict) -> Any:
        """Run the layer or go round it."""
        return follow(gate, self.on[:, gate.index], self.full, x, args, kwargs)

    def routing(self, depth: int) -> Routing:
        """The same."""
        return Routing(self.on.float(), self.on)


def follow(gate: Gate, on: Tensor, full: bool, x: Tensor, args: tuple, kwargs: dict) -> Any:
    """One layer for rows of which some may pass it by."""
    wanted = on.tolist()
    if full:
        return (gate.through if any(wanted) else gate.uncached)(x, args, kwargs)
    if not any(wanted) and not _all_must_run():
        return gate.around(x, args, kwargs)
    made = gate.through(x, args, kwargs)
    return made if all(wanted) else gate.change(made, lambda y: torch.where(on[:, None, None], y, x))


def _all_must_run() -> bool:
    # processes that train together must each reach every adapter, or they wait for its gradient
    return torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized()


def prompt_mask(lengths: Tensor | None, counts: list[int], real: Tensor) -> Tensor:
    """[B,T] bool, the prompt's places in left-aligned rows.

    Raises:
        ConfigError: no lengths. DataError: an empty prompt, or one longer than its row.
    """
    if lengths is None:
        raise ConfigError("RoutedModel: the routers read the prompt alone, so routed() needs prompt_length")
    for row, (length, count) in enumerate(zip(lengths.tolist(), counts)):
        if length < 1:
            raise DataError(f"prompt_length of row {row} is {length}: the routers need at least one prompt token")
        if length > count:
            raise DataError(f"prompt_length of row {row} is {length}, but its mask has {count} real tokens")
    return torch.arange(real.shape[1], device=real.device) < lengths.to(real.device)[:, None]


def on_of(state: DecodeState, warn: bool = False) -> Tensor:
    """[B,N] bool, the routing that a state follows."""
    if warn:
        warnings.warn(
            "RoutedModel: this cache holds an earlier turn, whose routing stays; open() decides anew", stacklevel=3
        )
    return state.extras["routing"].on
