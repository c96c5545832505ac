"""Sums over evaluation tokens, merged exactly over batches and processes: what the card's numbers are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import all_gather_object

from quire.roles.sparse.ranks import ranks


@dataclass
class Sums:
    """Sums over N tokens. Two are merged by ``+``, whatever the split was (Chan et al. 1983 for the variance).

    Attributes:
        count: N.
        mean: [D] fp64 of what is rebuilt.
        spread: Sum of squared distances to ``mean``.
        square: Sum of squared norms.
        error: Sum of squared errors.
        cosine: Sum of cosines between a token and its rebuild, over ``sized`` tokens.
        ratio: Sum of their norms' ratios, rebuild over token.
        sized: Tokens that are not 0.
        l0: Active latents, summed; the least and the most of one token beside it.
        fired: [F] int64, tokens on which each latent is active.
        extra: Sums and counts of numbers that others add, by name.
    """

    count: int
    mean: Tensor
    spread: float
    square: float
    error: float
    cosine: float
    ratio: float
    sized: int
    l0: int
    l0_min: int
    l0_max: int
    fired: Tensor
    extra: dict[str, tuple[float, int]] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def of(cls, x: Tensor, made: Tensor, active: Tensor, fired: Tensor, extra: Mapping[str, Tensor]) -> Sums:
        """The sums of one batch.

        Args:
            x: [N,D] in the units of the data.
            made: [N,D] its rebuild.
            active: [N] active latents.
            fired: [F].
            extra: [N] by name; a value that isn't finite is left out of the mean.
        """
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        x, made = x.to(wide), made.to(wide)
        mean = x.mean(0)
        norm, other = x.norm(dim=1), made.norm(dim=1)
        sized = norm > 0
        cosine = (x * made).sum(1) / (norm * other).clamp(min=1e-30)
        ratio = other / norm.clamp(min=1e-30)
        more = {}
        for name, values in extra.items():
            finite = torch.isfinite(values)
            more[name] = (float(values[finite].double().sum()), int(finite.sum()))
        return cls(
            count=len(x),
            mean=mean.cpu().double(),
            spread=float((x - mean).square().sum()),
            square=float(norm.square().sum()),
            error=float((made - x).square().sum()),
            cosine=float(cosine[sized].sum()),
            ratio=float(ratio[sized].sum()),
            sized=int(sized.sum()),
            l0=int(active.sum()),
            l0_min=int(active.min()),
            l0_max=int(active.max()),
            fired=fired.cpu(),
            extra=more,
        )

    def __add__(self, other: Sums) -> Sums:
        count = self.count + other.count
        step = other.mean - self.mean
        between = float(step.square().sum()) * self.count * other.count / count
        names = [*self.extra, *(n for n in other.extra if n not in self.extra)]
        none = (0.0, 0)
        added = {n: (self.extra.get(n, none), other.extra.get(n, none)) for n in names}
        return Sums(
            count=count,
            mean=self.mean + step * (other.count / count),
            spread=self.spread + other.spread + between,
            square=self.square + other.square,
            error=self.error + other.error,
            cosine=self.cosine + other.cosine,
            ratio=self.ratio + other.ratio,
            sized=self.sized + other.sized,
            l0=self.l0 + other.l0,
            l0_min=min(self.l0_min, other.l0_min),
            l0_max=max(self.l0_max, other.l0_max),
            fired=self.fired + other.fired,
            extra={n: (a[0] + b[0], a[1] + b[1]) for n, (a, b) in added.items()},
        )

    def numbers(self) -> dict[str, float]:
        """The card's numbers that need no subject, by name; ``extra``'s are means."""
        made = {
            "l0": self.l0 / self.count,
            "l0_min": float(self.l0_min),
            "l0_max": float(self.l0_max),
            "fvu": over(self.error, self.spread),
            "nmse": over(self.error, self.square),
            "cosine": over(self.cosine, self.sized),
            "norm_ratio": over(self.ratio, self.sized),
            "dead": float((self.fired == 0).double().mean()),
        }
        return made | {name: over(total, count) for name, (total, count) in self.extra.items()}


def over(above: float, below: float) -> float:
    """A ratio; NaN where there is nothing to divide by."""
    return above / below if below else math.nan


def joined(mine: Sums | None) -> Sums | None:
    """The sums of all processes; every process must call it. None where no process has any."""
    everyone: list[Sums | None] = [mine]
    if ranks() > 1:
        everyone = [None] * ranks()
        all_gather_object(everyone, mine)
    whole: Sums | None = None
    for part in everyone:
        whole = part if whole is None else whole if part is None else whole + part
    return whole
