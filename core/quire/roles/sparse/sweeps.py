"""Many cards side by side: Pareto plots, tables at matched L0, means and spread over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from quire.errors import ConfigError

if TYPE_CHECKING:
    from quire.roles.sparse.result import Card

COLOURS = ("#3b5bdb", "#e8590c", "#2b8a3e", "#ae3ec9", "#c92a2a", "#0b7285", "#5c4033", "#495057")


@dataclass(frozen=True)
class Spread:
    """One number over seeds: mean, sample standard deviation (NaN for one seed), and how many seeds."""

    mean: float
    sd: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of the values that are numbers."""
        real = [v for v in values if not math.isnan(v)]
        if not real:
            return cls(math.nan, math.nan, 0)
        return cls(fmean(real), stdev(real) if len(real) > 1 else math.nan, len(real))

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "-"
        return f"{self.mean:.4g}" + ("" if math.isnan(self.sd) else f" ± {self.sd:.2g}")


def spread(cards: Sequence[Card], number: str) -> dict[str, Spread]:
    """One number by the cards' names, over their seeds."""
    return {name: Spread.of([c.get(number) for c in own]) for name, own in _arms(cards).items()}


def at_l0(cards: Sequence[Card], l0: float, number: str = "delta_ce") -> float:
    """A number at an L0 between two cards of one sweep, linear in log L0; NaN outside the sweep, never extrapolated."""
    points = sorted((c["l0"], c.get(number)) for c in cards if c["l0"] > 0 and not math.isnan(c.get(number)))
    for (low, left), (high, right) in pairwise(points):
        if low <= l0 <= high:
            share = 0.0 if high == low else math.log(l0 / low) / math.log(high / low)
            return left + share * (right - left)
    exact = [v for x, v in points if x == l0]
    return exact[0] if exact else math.nan


def matched(
    cards: Sequence[Card], numbers: Sequence[str] = ("delta_ce", "fvu"), at: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """Arms compared at the same L0, over seeds.

    Args:
        cards: Of sweeps: an arm is a name, a sweep is an arm's cards of one seed.
        numbers: What is compared.
        at: L0 values; by default the mean L0 of each sweep point of the first arm that lies inside every arm's range.

    Returns:
        One row an L0 and arm: ``l0``, ``arm``, and each number as a ``Spread`` over seeds.

    Raises:
        ConfigError: no cards, or none of the L0 values lies inside the range of every arm.
    """
    if not cards:
        raise ConfigError("a matched-L0 table needs cards")
    arms = _arms(cards)
    low = max(min(c["l0"] for c in own) for own in arms.values())
    high = min(max(c["l0"] for c in own) for own in arms.values())
    if at is None:
        first = next(iter(arms.values()))
        seed = first[0].seed
        at = sorted(c["l0"] for c in first if c.seed == seed)
        at = [x for x in at if low <= x <= high] or ([math.sqrt(low * high)] if low <= high else [])
    at = [x for x in at if low <= x <= high]
    if not at:
        ranges = ", ".join(
            f"{n} {min(c['l0'] for c in o):.3g} to {max(c['l0'] for c in o):.3g}" for n, o in arms.items()
        )
        raise ConfigError(f"the arms have no L0 in common ({ranges}): sweep k or the penalty further")
    rows = []
    for l0 in at:
        for name, own in arms.items():
            sweeps = _seeds(own)
            row: dict[str, Any] = {"l0": l0, "arm": name}
            row |= {n: Spread.of([at_l0(sweep, l0, n) for sweep in sweeps.values()]) for n in numbers}
            rows.append(row)
    return rows


def matched_text(rows: Sequence[dict[str, Any]]) -> str:
    """``matched`` as a Markdown table; each number is mean ± sample standard deviation over seeds."""
    numbers = [k for k in rows[0] if k not in ("l0", "arm")]
    lines = [f"| L0 | arm | {' | '.join(numbers)} | seeds |", "| --- " * (len(numbers) + 3) + "|"]
    for row in rows:
        cells = " | ".join(str(row[n]) for n in numbers)
        lines.append(f"| {row['l0']:.3g} | {row['arm']} | {cells} | {max(row[n].seeds for n in numbers)} |")
    return "\n".join(lines) + "\n"


def pareto(cards: Sequence[Card], file: str | Path, number: str = "delta_ce") -> Path:
    """Draw a number against L0, one colour an arm: every card a point, a line through an arm's means over seeds.

    Args:
        cards: Their ``name`` is the arm. Points of one arm belong together by rank of L0 within their seed.
        file: A PNG.
        number: What is drawn; ``delta_ce`` by default, ``fvu`` where no card has been spliced.

    Returns:
        The file.

    Raises:
        ConfigError: no card has the number.
    """
    from matplotlib.figure import Figure

    if number == "delta_ce" and all(math.isnan(c.get(number)) for c in cards):
        number = "fvu"
    cards = [c for c in cards if not math.isnan(c.get(number))]
    if not cards:
        raise ConfigError(f"no card has the number {number}: nothing to draw")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, own) in enumerate(_arms(cards).items()):
        colour = COLOURS[place % len(COLOURS)]
        axes.scatter([c["l0"] for c in own], [c[number] for c in own], s=14, color=colour, alpha=0.5, linewidths=0)
        ranked = [sorted(sweep, key=lambda c: c["l0"]) for sweep in _seeds(own).values()]
        most = max(map(len, ranked))
        points = [[s[i] for s in ranked if i < len(s)] for i in range(most)]
        xs, ys = ([fmean(c[n] for c in p) for p in points] for n in ("l0", number))
        axes.plot(xs, ys, "o-", color=colour, markersize=4.5, linewidth=1.4, label=f"{name or 'dictionary'}")
    axes.set_xscale("log")
    axes.set_xlabel("L0: active latents per token")
    axes.set_ylabel({"delta_ce": "ΔCE: loss added by the splice, nats per token", "fvu": "FVU"}.get(number, number))
    if min(c[number] for c in cards) >= 0:
        axes.set_ylim(bottom=0)
    axes.grid(True, which="both", linewidth=0.4, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    seeds = len({c.seed for c in cards})
    axes.legend(frameon=False, title=f"mean of {seeds} seeds" if seeds > 1 else None)
    target = Path(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(str(target), dpi=150)
    return target


def draw_density(card: Card, file: Path) -> None:
    """The density histogram of one card."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    axes = figure.add_subplot()
    if card.density:
        axes.stairs(card.density, card.edges, fill=True, color=COLOURS[0], alpha=0.85)
    axes.set_xlabel("log10 of the share of tokens a latent is active on")
    axes.set_ylabel("latents")
    dead = card.get("dead")
    axes.set_title(f"density; {100 * dead:.1f} % never active" if not math.isnan(dead) else "density", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(str(file), dpi=140)


def _arms(cards: Sequence[Card]) -> dict[str, list[Card]]:
    made: dict[str, list[Card]] = {}
    for card in cards:
        made.setdefault(card.name, []).append(card)
    return made


def _seeds(cards: Sequence[Card]) -> dict[int, list[Card]]:
    made: dict[int, list[Card]] = {}
    for card in cards:
        made.setdefault(card.seed, []).append(card)
    return made
