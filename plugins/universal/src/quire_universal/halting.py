"""When a position stops: adaptive computation time per position, per sequence, and at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quire.contracts import Part, Spec
from quire.errors import ConfigError
from quire_universal.sight import Sight, StepCache

MODES = ("accumulated", "basic")
HALTED = ("copy", "run")


@dataclass
class Ponder:
    """What thinking cost.

    Attributes:
        cost: [B,T] steps plus remainder; the gradient is the remainder's.
        steps: [B,T] steps taken, 0 for padding.
        mask: [B,T] bool, True = real; None without padding.
    """

    cost: Tensor
    steps: Tensor
    mask: Tensor | None = None

    def mean(self, what: Tensor | None = None) -> Tensor:
        """Mean of ``what`` (default: the cost) over real positions."""
        value = self.cost if what is None else what
        if self.mask is None:
            return value.mean()
        return (value * self.mask).sum() / self.mask.sum().clamp(min=1)


class Halt:
    """The accumulators of one pass. fp32 at least; whether a position runs is a boolean, never read off a float."""

    def __init__(self, halting: Halting, state: Tensor, real: Tensor | None) -> None:
        self.halting, self.real = halting, real
        shape = state.shape[:2]
        kind = torch.float64 if state.dtype == torch.float64 else torch.float32
        self.running = torch.ones(shape, dtype=torch.bool, device=state.device) if real is None else real.clone()
        self.sum, self.remainder, self.steps = (torch.zeros(shape, dtype=kind, device=state.device) for _ in range(3))
        self.out = torch.zeros(state.shape, dtype=kind, device=state.device)

    def weigh(self, p: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        """Weight [B,T] of this step's state, and who took the step.

        Args:
            p: [B,T] halting probabilities.
            last: Whether no step follows.
        """
        p = p.to(self.sum.dtype)
        active = self.running
        over = self.sum + p > 1 - self.halting.epsilon  # strictly: at the threshold one goes on
        if last and self.halting.force_remainder:
            over = torch.ones_like(over)
        stops, goes = active & over, active & ~over
        rest = stops * (1 - self.sum)
        weight = p * goes + rest
        self.sum = self.sum + weight
        self.remainder = self.remainder + rest
        self.steps = self.steps + active
        self.running = goes
        return weight, active

    def add(self, made: Tensor, weight: Tensor) -> None:
        """Take the step's state [B,T,D] into the output."""
        share = weight[..., None]
        kept = self.out * (1 - share) if self.halting.mode == "basic" else self.out
        self.out = kept + made.to(self.out.dtype) * share

    def ponder(self) -> Ponder:
        """What it cost."""
        return Ponder(self.steps + self.remainder, self.steps, self.real)


@dataclass
class Moment:
    """What a halting rule may look at before a step.

    Attributes:
        x: [B,T,D] the step's input, signals included.
        sight: What its positions see.
        step: Which step comes, from 1.
        cache: The step's slots, or None in a pass over whole rows.
        generator: Of random halting.
    """

    x: Tensor
    sight: Sight
    step: int
    cache: StepCache | None = None
    generator: torch.Generator | None = None


class Halting(Part):
    """Role of a halting rule inside UniversalEncoder and UniversalDecoder. Dehghani et al. 2018.

    Args:
        max_steps: Most steps a position takes.
        epsilon: A position stops once its summed probability passes 1 - epsilon.
        bias: Start of the halting unit's bias; 1 means p = .73, two steps.
        mode: ``accumulated``: the output is the weighted sum of the states, weights sum to 1. ``basic``: the official
            code's running interpolation, whose weights sum to less.
        halted: ``copy`` keeps a stopped position's state, ``run`` goes on transforming it for others to see.
        force_remainder: Whether a position that reaches ``max_steps`` gets the rest of its weight there.

    Raises:
        ConfigError: ``max_steps`` below 1, ``epsilon`` outside (0, 1), an unknown ``mode`` or ``halted``.
    """

    def __init__(
        self,
        max_steps: int = 12,
        epsilon: float = 0.01,
        bias: float = 1.0,
        mode: str = "accumulated",
        halted: str = "copy",
        force_remainder: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if max_steps < 1:
            raise ConfigError(f"{name}.max_steps must be at least 1, got {max_steps}")
        if not 0 < epsilon < 1:
            raise ConfigError(f"{name}.epsilon must be in (0, 1), got {epsilon}")
        if mode not in MODES or halted not in HALTED:
            raise ConfigError(
                f"{name}.mode is accumulated or basic, halted is copy or run; got {mode!r} and {halted!r}"
            )
        self.max_steps, self.epsilon, self.bias, self.mode = max_steps, epsilon, bias, mode
        self.halted, self.force_remainder = halted, force_remainder

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Reverse three digits, at most four steps on each."""
        from quire_universal.objective import tiny_seq2seq

        return tiny_seq2seq({"class_path": cls.__name__, "init_args": {"max_steps": 4, "bias": -0.5}})

    @property
    def copies(self) -> bool:
        """Whether a stopped position's state stays as it is."""
        return self.halted == "copy"

    def probability(
        self,
        x: Tensor,
        sight: Sight,
        step: int,
        cache: StepCache | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Halting probabilities [B,T] from the step's input [B,T,D], signals included."""
        logits = self.logits(Moment(x, sight, step, cache, generator))
        return torch.sigmoid(logits).expand(x.shape[:2])

    def logits(self, at: Moment) -> Tensor:
        """What a subclass writes: [B,T] before the sigmoid, in fp32 at least; the bias is in it."""
        raise NotImplementedError

    def remember(self, x: Tensor, sight: Sight, cache: StepCache) -> None:
        """Keep what later tokens read of a stopped position's remaining steps."""


class ACT(Halting):
    """Every position stops by itself: Graves's adaptive computation time, as in Dehghani et al. 2018."""

    def build(self, spec: Spec) -> None:
        """The halting unit; ``width`` is the state's."""
        self.unit = nn.Linear(spec.need("width", self), 1)
        nn.init.constant_(self.unit.bias, self.bias)

    def score(self, x: Tensor) -> Tensor:
        """[B,T,D] → [B,T] without the bias, in fp32 at least, autocast or not."""
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        return (x.to(kind) * self.unit.weight[0].to(kind)).sum(-1)

    def logits(self, at: Moment) -> Tensor:
        """The halting unit on each position."""
        return self.score(at.x) + self.unit.bias


class GlobalACT(ACT):
    """All positions stop together, by their mean; in a decoder by the mean of those seen. Dehghani et al. 2018, code.

    A decoder's position may not know later ones, so there the mean is over the tokens that it sees.
    """

    def logits(self, at: Moment) -> Tensor:
        """The halting unit on the mean over what a position sees."""
        score = self.score(at.x)
        whole = score if at.cache is None else at.cache.put("score", score, at.sight)
        seen = at.sight.seen(score.shape[1], whole.shape[1]).to(score.dtype)
        mean = (seen * whole[:, None]).sum(-1) / seen.sum(-1).clamp(min=1)
        return mean + self.unit.bias

    def remember(self, x: Tensor, sight: Sight, cache: StepCache) -> None:
        """Its score."""
        cache.put("score", self.score(x), sight)


class RandomSteps(Halting):
    """Halting probabilities drawn at random: the control for a learnt rule. Dehghani et al. 2018, code.

    p is the sigmoid of ``bias`` plus a logistic draw, so a bias of 0 is uniform. Outside training a draw is a fixed
    function of position and step, so decoding with and without a cache agree.
    """

    def logits(self, at: Moment) -> Tensor:
        """A draw for each position."""
        if self.training:
            draw = torch.rand(at.x.shape[:2], device=at.x.device, generator=at.generator)
        else:
            mixed = (at.sight.places * 73856093 + at.step * 19349663) % 2147483647
            draw = (mixed * 48271 % 2147483647).float() / 2147483647
        return torch.logit(draw, eps=1e-6) + self.bias
