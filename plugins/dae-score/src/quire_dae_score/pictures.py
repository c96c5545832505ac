"""Drawing: a vector field over points, what is restored from noise, and chains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire_dae_score.energy import Score

ARROWS = 21
"""Arrows along one side."""


def draw_field(file: Path, score: Score, points: Tensor, sigma: float, chains: Tensor | None = None) -> None:
    """The score as arrows over data points [N,2]: ‖s‖ in colour; chains [B,K,2] as lines beside it."""
    low, high = points.amin(0), points.amax(0)
    shape = float((high - low)[1] / (high - low)[0].clamp_min(1e-12))
    figure, axes = _figure(2 if chains is not None else 1, shape)
    pad = 0.15 * (high - low)
    sides = [torch.linspace(float(a), float(b), ARROWS) for a, b in zip(low - pad, high + pad)]
    at = torch.cartesian_prod(*sides).to(points)
    slope = score(at).cpu()
    length = slope.norm(dim=1)
    unit = slope / length.clamp_min(1e-12)[:, None]
    shown = points[:: max(1, len(points) // 1500)].cpu()
    for place in axes:
        place.scatter(*shown.T.numpy(), s=2, color="#c9c9c9", linewidths=0)
        place.set_aspect("equal")
        place.set_xticks([])
        place.set_yticks([])
    grid = at.cpu().numpy()
    arrows = axes[0].quiver(*grid.T, *unit.T.numpy(), length.log10().numpy(), cmap="viridis", width=0.004, scale=28)
    figure.colorbar(arrows, ax=axes[0], fraction=0.04, pad=0.02, label="log10 of the score's length")
    axes[0].set_title(f"score (r(x) − x)/σ², σ = {sigma:g}", fontsize=9)
    if chains is not None:
        states = chains.flatten(0, 1).cpu()
        axes[1].scatter(*states[:: max(1, len(states) // 4000)].T.numpy(), s=2, color="#7d9cc0", linewidths=0)
        for chain, colour in zip(chains[:3].cpu(), ("#b2182b", "#1b7837", "#762a83")):
            axes[1].plot(*chain.T.numpy(), lw=0.6, color=colour, alpha=0.8)
            axes[1].plot(*chain[0].numpy(), "o", ms=4, color=colour)
        axes[1].set(xlim=axes[0].get_xlim(), ylim=axes[0].get_ylim())
        axes[1].set_title(f"{len(chains)} chains (data grey, states blue), three of them traced", fontsize=9)
    _save(figure, file)


def draw_rows(file: Path, rows: Tensor, columns: list[str], title: str) -> None:
    """Images [R,K,C,H,W] as a table of R rows: K of them side by side, each column with its name."""
    from matplotlib.figure import Figure

    count, across, channels, height, width = rows.shape
    gap = 1
    canvas = torch.ones(channels, count * (height + gap) - gap, across * (width + gap) - gap)
    for i in range(count):
        for k in range(across):
            top, left = i * (height + gap), k * (width + gap)
            canvas[:, top : top + height, left : left + width] = rows[i, k].cpu().float().clamp(0, 1)
    figure = Figure(figsize=(0.62 * across + 0.4, 0.62 * count * height / width + 0.7), layout="constrained")
    axes = figure.add_subplot()
    shown = canvas.permute(1, 2, 0) if channels == 3 else canvas.mean(0)
    axes.imshow(shown.numpy(), "gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([k * (width + gap) + width / 2 - 0.5 for k in range(across)], columns, fontsize=7)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_yticks([])
    axes.set_frame_on(False)
    figure.suptitle(title, fontsize=8)
    _save(figure, file)


def _figure(columns: int, shape: float) -> tuple[Any, list[Any]]:
    """Panels of 4.6 inches across, as high as the data are in proportion."""
    from matplotlib.figure import Figure

    tall = 4.6 * min(1.5, max(0.4, shape)) + 0.3
    figure = Figure(figsize=(5.4 + 4.6 * (columns - 1), tall), layout="constrained")
    return figure, [figure.add_subplot(1, columns, i + 1) for i in range(columns)]


def _save(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(str(file), dpi=130)
