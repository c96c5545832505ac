"""An image as a jigsaw: shuffle its patches, put them back by predicted places, draw both beside the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.roles.tokens.contract import Segment
from quire.roles.tokens.patches import patchify, unpatchify


def rearrange(image: Tensor, order: Tensor, segment: Segment) -> Tensor:
    """Images whose cell i holds what was in cell ``order[b, i]``: [B,C,H,W] and [B,N] → [B,C,H,W]."""
    patch, grid = (segment.patch[0], segment.patch[1]), (segment.grid[0], segment.grid[1])
    cells = patchify(image, patch)
    return unpatchify(cells.gather(1, order[..., None].expand_as(cells)), grid, patch)


def one_to_one(logits: Tensor) -> Tensor:
    """The likeliest assignment in which every cell is used once.

    Args:
        logits: [B,N,N], token by cell.

    Returns:
        [B,N] int64, the token that each cell gets.
    """
    from scipy.optimize import linear_sum_assignment

    scores = logits.detach().float().log_softmax(-1).cpu().numpy()
    found = []
    for score in scores:
        token, cell = linear_sum_assignment(score, maximize=True)
        back = torch.empty(len(cell), dtype=torch.long)
        back[torch.from_numpy(cell)] = torch.from_numpy(token)
        found.append(back)
    return torch.stack(found)


def draw(file: Path, title: str, original: Tensor, shuffled: Tensor, back: Tensor, notes: list[str]) -> None:
    """Three pictures a row: the original, its patches shuffled, and put back.

    Args:
        file: PNG to write; its folder is made.
        title: Above all.
        original: [B,C,H,W] in [0,1].
        shuffled: The same with shuffled patches.
        back: The same, put back.
        notes: Under each put-back image.
    """
    from matplotlib.figure import Figure

    columns = min(2, len(original))
    rows = -(-len(original) // columns)
    figure = Figure(figsize=(4.4 * columns, 1.62 * rows + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=8)
    axes = figure.subplots(rows, 3 * columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, note in enumerate(notes):
        place = axes[i // columns, 3 * (i % columns) : 3 * (i % columns) + 3]
        for axis, image, said in zip(place, (original[i], shuffled[i], back[i]), ("original", "shuffled", note)):
            _show(axis, image, said)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(str(file), dpi=130)


def _show(axis: Any, image: Tensor, title: str) -> None:
    pixels = image.detach().float().cpu().clamp(0, 1)
    axis.set_title(title, fontsize=7)
    if len(pixels) == 3:
        axis.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
    else:
        axis.imshow(pixels.mean(0).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
