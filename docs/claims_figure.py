"""One figure of all claims: every arm with its spread, and every requirement with what was measured."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {True: "#2e7d4f", False: "#b3402a", None: "#777777"}


def draw(kept: Path, file: Path) -> None:
    """Write the figure of all results in ``kept``; nothing when there are none."""
    reports = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(kept.glob("*.json"))]
    if not reports:
        return
    rows = [max(len(arms(r)), len(r["bands"]) * 1.6) + 2.5 for r in reports]
    figure = Figure(figsize=(13, 0.19 * sum(rows)), layout="constrained")
    grid = figure.add_gridspec(len(reports), 2, height_ratios=rows)
    for i, report in enumerate(reports):
        _arms(figure.add_subplot(grid[i, 0]), report)
        _bands(figure.add_subplot(grid[i, 1]), report)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(str(file), dpi=90)


def arms(report: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Mean and deviation of each arm in the number that the claim is about."""
    metric = headline(report)
    return {arm: values[metric] for arm, values in report["arms"].items() if metric in values}


def headline(report: Mapping[str, Any]) -> str:
    """The number that the claim is about, else the first one."""
    return report.get("headline") or next(iter(next(iter(report["arms"].values()))))


def bounds(needed: str) -> tuple[float, float]:
    """The allowed interval that a requirement's text begins with: ``>= 3``, ``< 0.5``, ``in [1.3, 4]``, ``within 3``.

    Both infinite when it has none.
    """
    number = r"([-+]?[\d.]+(?:e[-+]?\d+)?)"
    needed = needed.replace("1/3", "0.3333")
    if found := re.fullmatch(rf"{number} ± {number}", needed):
        return float(found[1]) - float(found[2]), float(found[1]) + float(found[2])
    if re.fullmatch(number, needed):
        return float(needed), float(needed)
    if found := re.match(rf"in \[{number}, {number}\]", needed):
        return float(found[1]), float(found[2])
    if found := re.match(rf"within {number}", needed):
        return -float(found[1]), float(found[1])
    if found := re.match(rf"(?:>=?|at least|above) ?{number}", needed):
        return float(found[1]), math.inf
    if found := re.match(rf"(?:<=?|at most|below) ?{number}", needed):
        return -math.inf, float(found[1])
    return -math.inf, math.inf


def _arms(axes: Axes, report: Mapping[str, Any]) -> None:
    found = arms(report)
    places = range(len(found))
    colour = COLOURS[{"reproduced": True, "not reproduced": False}.get(report["verdict"])]
    axes.barh(places, [v["mean"] for v in found.values()], xerr=[v["sd"] for v in found.values()], color="#9bb7d4")
    axes.set_yticks(places, [a[:40] for a in found], fontsize=7)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title(f"{report['plugin']}: {report['verdict']}", loc="left", fontsize=10, color=colour)
    axes.set_xlabel(headline(report), fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _bands(axes: Axes, report: Mapping[str, Any]) -> None:
    for i, band in enumerate(report["bands"]):
        low, high = bounds(band["needed"])
        ends = [e for e in (low, high, band["measured"]) if math.isfinite(e)] or [0.0]
        room = (max(ends) - min(ends)) or abs(ends[0]) or 1.0
        left, right = min(ends) - 0.5 * room, max(ends) + 0.5 * room

        def place(value: float, left: float = left, right: float = right) -> float:
            return min(max((value - left) / (right - left), 0.0), 1.0)

        axes.plot([0, 1], [i, i], color="#dddddd", linewidth=1)
        if math.isfinite(low) or math.isfinite(high):
            axes.plot([place(low), place(high)], [i, i], color="#bfdcc8", linewidth=6, solid_capstyle="butt")
        axes.plot([place(band["measured"])], [i], "o", color=COLOURS[band["held"]], markersize=6)
        said = f"{band['text']}: {band['measured']:.4g}, needed {band['needed']}"
        axes.text(1.04, i, "\n".join(textwrap.wrap(said, 80)[:3]), fontsize=6.5, va="center")
    axes.set_xlim(-0.03, 3.2)
    axes.set_ylim(len(report["bands"]) - 0.4, -0.6)
    axes.axis("off")
