"""Rows of the source as a reader sees them: text around a token, or an image with its patches."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quire.contracts import Batch
from quire.roles.sparse.report.found import Context, Piece

SMALLEST = 96
"""Pixels of a picture's longer side, at least; small images are enlarged without smoothing."""


class Samples:
    """Rows of one split, read when they are asked for.

    Args:
        data: An Activations data module with a subject.
        split: Its split.
    """

    def __init__(self, data: Any, split: str) -> None:
        self.data, self.rows = data, data.rows(split)
        self.kept: dict[int, Batch] = {}
        self.notes: list[str] = []

    def fill(self, context: Context, values: Mapping[int, float], width: int) -> None:
        """Put text or picture into a context.

        Args:
            context: With its place.
            values: Activation by position, of this row.
            width: Characters of text, half of them on either side.
        """
        row, at = context.where
        batch = self._row(row)
        if "tokens" in batch and self.data.tokenizer is not None:
            ids = batch["tokens"][0]
            ids = ids[batch["mask"][0]] if "mask" in batch else ids
            texts = [text_of(self.data.tokenizer, int(i)) for i in ids]
            low, high = around(texts, at, width)
            context.pieces = [Piece(texts[i], values.get(i, 0.0)) for i in range(low, high)]
            context.at = at - low
        elif "image" in batch and (grid := self._grid()) is not None:
            prefix = int(getattr(self.data.subject.part, "prefix_tokens", 0) or 0)
            context.picture, context.grid = picture(batch["image"][0]), grid
            context.heat = [values.get(prefix + i, 0.0) for i in range(grid[0] * grid[1])]
        else:
            self._note("No contexts: the source gives neither text with a tokenizer nor images in patches.")

    def _row(self, row: int) -> Batch:
        if row not in self.kept:
            self.kept[row] = self.rows.batch([row])
        return self.kept[row]

    def _grid(self) -> tuple[int, int] | None:
        layout = getattr(self.data.subject.part, "built_layout", None)
        for segment in getattr(layout, "segments", ()):
            if segment.field == "image" and len(segment.grid) == 2:
                return tuple(segment.grid)  # type: ignore[return-value]
        return None

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def around(texts: Sequence[str], at: int, width: int) -> tuple[int, int]:
    """First and last + 1 of the tokens that fit into ``width`` characters, half of them on either side of ``at``."""
    low, high, half = at, at + 1, width // 2
    while low and sum(map(len, texts[low - 1 : at])) <= half:
        low -= 1
    while high < len(texts) and sum(map(len, texts[at + 1 : high + 1])) <= half:
        high += 1
    return low, high


def text_of(tokenizer: Any, token: int) -> str:
    """One token as text; a special id, a control sign, or bytes that are no whole letter by its number."""
    try:
        text: str = tokenizer.decode([token])
    except (IndexError, KeyError, ValueError):
        text = ""
    whole = text and "\ufffd" not in text and all(c.isprintable() or c in "\n\t\r" for c in text)
    return text if whole else f"⟨{token}⟩"


def picture(image: Tensor) -> str:
    """[C,H,W] in [0,1] as a PNG in a data URI."""
    from PIL import Image

    pixels = (image.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1]
    whole = Image.fromarray(pixels.squeeze(0).numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy())
    times = max(1, -(-SMALLEST // max(whole.size)))
    whole = whole.resize((whole.width * times, whole.height * times), Image.Resampling.NEAREST)
    held = io.BytesIO()
    whole.save(held, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()
