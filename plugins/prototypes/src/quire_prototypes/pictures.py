"""The two pictures: all prototypes with the class each votes for, and test images explained by their nearest ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from quire.contracts import Batch
from quire_prototypes.modules import Explanation, PrototypeLayer
from quire_prototypes.training import Scan

SHOWN = 3
"""Prototypes in one explanation."""


class Board:
    """Captioned images in rows and columns, on one pair of axes: many axes would take seconds to lay out.

    Args:
        rows: Tiles down. columns: tiles across. title: one line above all.
        shape: Height and width in pixels of every image; the aspect is kept.
    """

    def __init__(self, rows: int, columns: int, shape: tuple[int, int], title: str) -> None:
        wide, self.caption, top = 1.25, 0.36, 0.3  # inches: a tile, its caption, the title
        self.tall = min(2.0, wide * shape[0] / shape[1])
        width, height = wide * columns, (self.tall + self.caption) * rows + top
        self.figure = Figure(figsize=(width, height), dpi=130)
        self.axes = self.figure.add_axes((0, 0, 1, 1 - top / height))
        self.axes.set(xlim=(0, columns), ylim=(rows * (self.tall + self.caption), 0))
        self.axes.axis("off")
        self.figure.text(0.5, 1 - 0.5 * top / height, title, ha="center", va="center", fontsize=8, wrap=True)

    def put(self, row: int, column: int, image: Tensor, caption: str) -> None:
        """One image [C,H,W] in [0,1] with at most two lines above it."""
        pixels = image.detach().float().cpu().clamp(0, 1).numpy()
        shown = pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels.mean(0)
        top = row * (self.tall + self.caption) + self.caption
        place = (column + 0.03, column + 0.97, top + self.tall * 0.97, top)
        self.axes.imshow(shown, "gray", vmin=0, vmax=1, extent=place, aspect="auto", interpolation="nearest")
        self.axes.text(column + 0.5, top - 0.03, caption, ha="center", va="bottom", fontsize=6.5, linespacing=1.1)

    def save(self, file: Path) -> np.ndarray:
        """Write the PNG; returns its pixels, [H,W,3] bytes."""
        columns, height = self.axes.get_xlim()[1], self.axes.get_ylim()[0]
        self.axes.set(xlim=(0, columns), ylim=(height, 0))
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
        return pixels


def draw_prototypes(file: Path, drawn: Tensor, layer: PrototypeLayer, found: Scan, near: Tensor | None) -> np.ndarray:
    """Each decoded prototype above its nearest training image. Returns the picture, [H,W,3] bytes."""
    count, columns = len(drawn), min(len(drawn), 10)
    owners, weights = layer.owners().tolist(), layer.class_weights.min(dim=1).values.tolist()
    title = "prototypes decoded → class voted for (weight); below each: nearest training image"
    board = Board(2 * -(-count // columns), columns, (drawn.shape[-2], drawn.shape[-1]), title)
    for j in range(count):
        row, column = 2 * (j // columns), j % columns
        board.put(row, column, drawn[j], f"p{j} → {owners[j]} ({weights[j]:.2g})")
        if near is not None:
            label = f"is {int(found.label[j])}, " if found.label is not None else ""
            board.put(row + 1, column, near[j], f"{label}D = {float(found.distance[j]):.2g}")
    return board.save(file)


def draw_explanations(file: Path, batch: Batch, again: Tensor, why: Explanation, drawn: Tensor) -> np.ndarray:
    """A row a test image: itself, its reconstruction, and its nearest prototypes with their part in the answer."""
    images, shown = batch["image"], min(SHOWN, len(drawn))
    title = "test image, reconstruction, nearest prototypes:\ndistance × weight = part of the answer's logit"
    board = Board(len(images), shown + 2, (images.shape[-2], images.shape[-1]), title)
    for i in range(len(images)):
        prediction = int(why.prediction[i])
        truth = f"is {int(batch['label'][i])}, " if "label" in batch else ""
        board.put(i, 0, images[i], f"{truth}answer {prediction}")
        board.put(i, 1, again[i], f"logit {float(why.logits[i, prediction]):.2f}")
        for k in range(shown):
            d, w, c = (float(t[i, k]) for t in (why.distance, why.weight, why.contribution))
            case = int(why.prototype[i, k])
            board.put(i, 2 + k, drawn[case], f"p{case} → {int(why.owner[i, k])}\n{d:.2g} × {w:.2g} = {c:.2g}")
    return board.save(file)
