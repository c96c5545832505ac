"""The two pictures: all prototypes with the class each votes for, and test images explained by their nearest ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from quire.contracts import Batch
from quire_prototypes.modules import Explanation, PrototypeLayer
from quire_prototypes.training import Scan

SHOWN = 3
"""Prototypes in one explanation."""


def draw_prototypes(file: Path, drawn: Tensor, layer: PrototypeLayer, found: Scan, near: Tensor | None) -> np.ndarray:
    """A grid: each decoded prototype above its nearest training image. Returns the picture, [H,W,3] bytes."""
    count, columns = len(drawn), min(len(drawn), 10)
    owners, weights = layer.owners().tolist(), layer.class_weights.min(dim=1).values.tolist()
    rows = -(-count // columns)
    figure = Figure(figsize=(1.15 * columns, 2.75 * rows + 0.5), layout="constrained")
    figure.suptitle(
        "prototypes decoded, with the class each votes for (weight); below: nearest training image", fontsize=8
    )
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for j in range(count):
        above, below = axes[2 * (j // columns), j % columns], axes[2 * (j // columns) + 1, j % columns]
        _show(above, drawn[j], f"p{j} → {owners[j]} ({weights[j]:.1f})")
        if near is not None:
            label = f"class {int(found.label[j])}, " if found.label is not None else ""
            _show(below, near[j], f"{label}D={float(found.distance[j]):.2g}")
    return _save(figure, file)


def draw_explanations(file: Path, batch: Batch, again: Tensor, why: Explanation, drawn: Tensor) -> np.ndarray:
    """A row a test image: itself, its reconstruction, and its nearest prototypes with their part in the answer."""
    images, shown = batch["image"], min(SHOWN, len(drawn))
    figure = Figure(figsize=(1.5 * (shown + 2), 1.75 * len(images) + 0.5), layout="constrained")
    figure.suptitle("test image, reconstruction, nearest prototypes: distance × weight = contribution", fontsize=8)
    axes = figure.subplots(len(images), shown + 2, squeeze=False)
    for i, row in enumerate(axes):
        prediction = int(why.prediction[i])
        truth = f"is {int(batch['label'][i])}, " if "label" in batch else ""
        _show(row[0], images[i], f"{truth}answer {prediction}")
        _show(row[1], again[i], f"logit {float(why.logits[i, prediction]):.2f}")
        for k in range(shown):
            d, w, c = (float(t[i, k]) for t in (why.distance, why.weight, why.contribution))
            case = int(why.prototype[i, k])
            _show(row[2 + k], drawn[case], f"p{case} → {int(why.owner[i, k])}\n{d:.2g} × {w:.2g} = {c:.2g}")
    return _save(figure, file)


def _show(axis: Any, image: Tensor, title: str) -> None:
    pixels = image.detach().float().cpu().clamp(0, 1).numpy()
    axis.axis("off")
    axis.set_title(title, fontsize=7)
    if pixels.shape[0] in (3, 4):
        axis.imshow(pixels.transpose(1, 2, 0), interpolation="nearest")
    else:
        axis.imshow(pixels.mean(0), cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def _save(figure: Figure, file: Path) -> np.ndarray:
    file.parent.mkdir(parents=True, exist_ok=True)
    canvas = FigureCanvasAgg(figure)
    figure.savefig(str(file), dpi=130)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
