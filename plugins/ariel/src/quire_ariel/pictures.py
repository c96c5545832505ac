"""Two pictures of the cube: a flat piece of it between four sentences, and the way from one sentence to another."""

from __future__ import annotations

import colorsys
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from quire_ariel.decoder import VolumeDecoder

SIDE, STEPS = 160, 11
"""Points along a side of the map at most, and of the walk."""
NUMBERS = 1 << 29
"""Probabilities that a map may ask for: a large vocabulary gets a coarser one."""
Read = Callable[[list[int]], str]


@dataclass
class Walk:
    """Sentences on a straight line.

    Attributes:
        texts: Of each step.
        bits: -log2 of each sentence's volume.
        valid: Whether a grammar accepts it; None without a grammar.
    """

    texts: list[str]
    bits: list[float]
    valid: list[bool | None]


def walk(
    cube: VolumeDecoder, start: Tensor, end: Tensor, read: Read, valid: Callable[[list[int]], bool | None]
) -> Walk:
    """What lies on the line between two points [d]."""
    share = torch.linspace(0, 1, STEPS, dtype=torch.float64, device=start.device)[:, None]
    found = cube.decode(start + share * (end - start))
    rows = found.rows()
    return Walk([read(r) for r in rows], (-found.log2_volume).tolist(), [valid(r) for r in rows])


def mixture(corners: Tensor, side: int = SIDE) -> Tensor:
    """[side*side,d]: all mixtures of four points [4,d] by place in a square, row by row; they stay in the cube."""
    t = torch.linspace(0, 1, side, dtype=torch.float64, device=corners.device)
    across, down = t.repeat(side)[:, None], t.repeat_interleave(side)[:, None]
    top = corners[0] + across * (corners[1] - corners[0])
    bottom = corners[2] + across * (corners[3] - corners[2])
    return top + down * (bottom - top)


def side_for(cube: VolumeDecoder) -> int:
    """Points along a side of the map that can be decoded in seconds."""
    return min(SIDE, max(2, math.isqrt(NUMBERS // (cube.caps().vocab_size * cube.max_length))))


def draw(
    file: Path, cube: VolumeDecoder, corners: Tensor, read: Read, steps: Walk, title: str, side: int | None = None
) -> int:
    """Write the picture. Returns how many different sentences the map shows.

    Args:
        file: PNG.
        cube: What decodes.
        corners: [4,d] points of four sentences; the walk is along the upper edge.
        read: Ids → text.
        steps: The walk.
        title: One line.
        side: Points along a side of the map; default as many as can be decoded in seconds.
    """
    side = side or side_for(cube)
    rows = cube.decode(mixture(corners, side)).rows()
    texts = [read(r) for r in rows]
    pixels = np.array([colour(text) for text in texts]).reshape(side, side, 3)
    figure = Figure(figsize=(11, 6.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[5, 6])
    left.imshow(pixels, interpolation="nearest", extent=(0, 1, 1, 0))
    left.set_xticks([]), left.set_yticks([])
    names = [texts[0], texts[side - 1], texts[-side], texts[-1]]
    places = ((0, 0, "left"), (1, 0, "right"), (0, 1, "left"), (1, 1, "right"))
    for mark, (x, y, side_) in zip("ABCD", places):
        inside = (0.03 if x == 0 else 0.97, 0.05 if y == 0 else 0.95)
        left.text(*inside, mark, ha=side_, va="center", fontsize=13, weight="bold")
    left.set_title(f"{title}\n{len(set(texts))} sentences between A, B, C and D", fontsize=9)
    left.set_xlabel("\n".join(f"{m}  {_cut(n, 60)}" for m, n in zip("ABCD", names)), fontsize=7.5, loc="left")
    right.axis("off")
    right.set(xlim=(0, 1), ylim=(len(steps.texts), -1))
    right.text(0, -0.6, "from A to B in equal steps: bits, sentence (red: the grammar refuses it)", fontsize=9)
    for i, (text, bits, good) in enumerate(zip(steps.texts, steps.bits, steps.valid)):
        right.add_patch(_patch(i, colour(text)))
        right.text(0.11, i, f"{bits:.1f}", fontsize=8.5, va="center", ha="right")
        right.text(0.13, i, _cut(text, 90), fontsize=8.5, va="center", color="#b2182b" if good is False else "#222222")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(str(file))
    return len(set(texts))


def colour(text: str) -> tuple[float, float, float]:
    """Hue by how a sentence opens (two words), lightness and strength by the whole of it; the same in every run."""
    opening = " ".join(text.split()[:2])
    hue = hashlib.sha256(opening.encode()).digest()[10] / 256  # apart for the grammar's openings
    whole = hashlib.sha256(text.encode()).digest()
    return colorsys.hls_to_rgb(hue, 0.55 + 0.3 * whole[0] / 256, 0.35 + 0.5 * whole[1] / 256)


def _patch(row: int, shade: tuple[float, float, float]) -> object:
    from matplotlib.patches import Rectangle

    return Rectangle((0, row - 0.35), 0.035, 0.7, color=shade)


def _cut(text: str, most: int) -> str:
    text = text.replace("$", r"\$")
    return text if len(text) <= most else text[: most - 1] + "…"
