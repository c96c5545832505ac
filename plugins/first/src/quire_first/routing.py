"""The routers: which layers a prompt needs. Pure torch. After Jain et al. 2024 (reconstruction)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from quire.errors import ConfigError

POOLINGS = ("mean", "last_token", "majority")
GATES = ("ste", "soft", "gumbel")


@dataclass
class Routing:
    """What was decided for each row.

    Attributes:
        rho: [B,N] fp32, probability that a layer runs; 1 for protected layers. With a gradient in training.
        on: [B,N] bool, whether it runs.
    """

    rho: Tensor
    on: Tensor

    @property
    def skip_rate(self) -> Tensor:
        """Mean share of layers skipped."""
        return 1 - self.on.float().mean()


@dataclass
class Decision:
    """One layer's part of a routing.

    Attributes:
        rho: [B].
        on: [B] bool.
        gate: [B] with the router's gradient; None where the gate is plainly ``on``.
    """

    rho: Tensor
    on: Tensor
    gate: Tensor | None


class Routers(nn.Module):
    """One linear unit a routed layer, on the parameter-free RMS norm of what the layer is given, in fp32.

    Args:
        layers: Layers that are routed, in order; the others have no router.
        width: D of what they read.
        init: Probability to run at the start, in (0, 1).
        pooling: ``mean`` of the tokens' scores, ``last_token``'s score, or ``majority``: each token votes.
        gate: Training gate: ``ste`` (hard, straight-through), ``soft``, or ``gumbel`` (straight-through with noise).
        threshold: A layer runs from this probability on.
    """

    def __init__(self, layers: list[int], width: int, init: float, pooling: str, gate: str, threshold: float) -> None:
        super().__init__()
        self.place = {layer: row for row, layer in enumerate(layers)}
        self.pooling, self.gate, self.threshold, self.temperature = pooling, gate, threshold, 1.0
        self.weight = nn.Parameter(torch.empty(len(layers), width))
        self.bias = nn.Parameter(torch.full((len(layers),), math.log(init / (1 - init))))
        nn.init.normal_(self.weight, std=0.01 / width**0.5)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))  # of training, for "routers are untrained"

    steps: Tensor

    def scores(self, layer: int, x: Tensor) -> Tensor:
        """[B,T,D] → [B,T]; elementwise, so that autocast leaves it in fp32."""
        row = self.place[layer]
        normal = rms_norm(x.float(), (x.shape[-1],), eps=1e-6)
        return (normal * self.weight[row].float()).sum(-1) + self.bias[row].float()

    def decide(
        self, layer: int, x: Tensor, prompt: Tensor, learning: bool, generator: torch.Generator | None = None
    ) -> Decision:
        """Whether each row runs ``layer``.

        Args:
            x: [B,T,D] what the layer is given.
            prompt: [B,T] bool, the tokens that count; at least one a row.
            learning: Make a gate with a gradient.
            generator: Of gumbel's noise.
        """
        scores = self.scores(layer, x)
        votes = None
        if self.pooling == "last_token":
            last = (prompt.long() * torch.arange(1, prompt.shape[1] + 1, device=prompt.device)).argmax(1)
            logit = scores.gather(1, last[:, None])[:, 0]
        elif self.pooling == "majority":
            each = scores.sigmoid()
            votes = pooled((each >= self.threshold).float(), prompt)
            logit = pooled(each, prompt).clamp(1e-6, 1 - 1e-6).logit()
        else:
            logit = pooled(scores, prompt)
        rho = logit.sigmoid()
        on = rho >= self.threshold if votes is None else votes >= 0.5
        if not learning:
            return Decision(rho, on, None)
        if self.gate == "soft":
            return Decision(rho, on, (logit / self.temperature).sigmoid())
        if self.gate == "gumbel":
            draw = torch.rand(logit.shape, generator=generator, device=logit.device).clamp(1e-6, 1 - 1e-6)
            gate = ((logit + draw.logit()) / self.temperature).sigmoid()
            return Decision(rho, gate >= 0.5, gate)
        return Decision(rho, on, rho)

    def mixed(self, decision: Decision, given: Tensor, made: Tensor) -> Tensor:
        """[B,T,D] behind the layer while learning: what it was ``given`` where it is off, what it ``made`` where on.

        Hard gates are exact: the added term is 0 and carries the router's gradient alone.
        """
        assert decision.gate is not None
        gate = decision.gate[:, None, None]
        if self.gate == "soft":
            return given + gate.to(given.dtype) * (made - given)
        through = (gate - gate.detach()).to(given.dtype) * (made - given).detach()
        return torch.where(decision.on[:, None, None], made, given) + through

    def size(self) -> Tensor:
        """Sum of squared weights and biases."""
        return self.weight.float().square().sum() + self.bias.float().square().sum()


def pooled(values: Tensor, prompt: Tensor) -> Tensor:
    """[B,T] → [B], the mean over a row's prompt."""
    real = prompt.to(values.dtype)
    return (values * real).sum(1) / real.sum(1)


def check_routing(name: str, threshold: float, pooling: str, gate: str, init: float) -> None:
    """Raise ``ConfigError`` for an argument out of range."""
    if not 0 < threshold < 1:
        raise ConfigError(f"{name}.threshold must be in (0, 1), got {threshold}")
    if not 0 < init < 1:
        raise ConfigError(f"{name}.init must be in (0, 1), got {init}")
    if pooling not in POOLINGS:
        raise ConfigError(f"{name}.pooling is {', '.join(POOLINGS)}; got {pooling!r}")
    if gate not in GATES:
        raise ConfigError(f"{name}.gate is {', '.join(GATES)}; got {gate!r}")
