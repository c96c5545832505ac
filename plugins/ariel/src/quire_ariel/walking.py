"""Points to sentences: cached steps of the language model, all rows at once, each until its end token.

Celotti et al. 2020; their batch decoder runs on behind the end token, this one stops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from quire_ariel.boxes import narrow, shares, token_at
from quire_ariel.codes import Sentences
from quire_ariel.errors import PointError
from quire_ariel.exact import Code, Point, of_float
from quire_ariel.rows import chunks
from quire_ariel.tables import frequencies

if TYPE_CHECKING:
    from quire_ariel.decoder import VolumeDecoder

ROWS, NUMBERS = 1024, 1 << 22
"""Most points, and most probabilities, of one step."""
SHARPNESS = 0.1
"""Of the soft choice behind the straight-through gradient, as a part of the axis."""

Chosen = tuple[Tensor, Tensor, Tensor | None]
"""Token [R], its frequency [R], and rows [R] that can't be told and leave the batch."""
Choose = Callable[[int, Tensor, Tensor], Chosen]
"""(step, rows alive [R], their tables [R,V]) → the choice."""


class Said:
    """What the rows have said so far.

    Args:
        cube: What decodes.
        count: Rows.
    """

    def __init__(self, cube: VolumeDecoder, count: int) -> None:
        caps, device = cube.caps(), cube.device
        most = cube.max_length if caps.positions_max is None else min(cube.max_length, caps.positions_max)
        self.tokens = torch.full((count, most), caps.pad_id, device=device)
        self.lengths = torch.zeros(count, dtype=torch.long, device=device)
        self.bits = torch.zeros(count, dtype=torch.float64, device=device)
        self.ended = torch.zeros(count, dtype=torch.bool, device=device)
        self.unsure = torch.zeros_like(self.ended)
        self.hot: list[Tensor] = []

    def forget(self, rows: Tensor) -> None:
        """Let these rows begin again."""
        self.lengths[rows], self.bits[rows] = 0, 0.0

    def sentences(self) -> Sentences:
        """The result."""
        width = int(self.lengths.max()) if len(self.lengths) else 0
        mask = torch.arange(width, device=self.lengths.device) < self.lengths[:, None]
        tokens = self.tokens[:, :width].where(mask, self.tokens.new_zeros(()))
        hot = torch.stack(self.hot, 1) if self.hot else None
        return Sentences(tokens, mask, ~self.ended, self.bits, torch.zeros_like(self.ended), hot)


def decode(cube: VolumeDecoder, points: Tensor, exact: Sequence[Sequence[Code]] | None) -> Sentences:
    """The sentences of points [B,d], or of exact codes.

    In float64 arithmetic the model's own precision decides where that is safe: a row that comes within the tolerance
    of a border of its box is decoded again with the model in float64.
    """
    if exact is None and cube.arithmetic == "exact":
        exact = [[of_float(x) for x in row] for row in inside(cube, points.detach().double().cpu()).tolist()]
    if exact is not None:
        said = Said(cube, len(exact))
        with cube.doubled():
            for rows in parts(cube, torch.arange(len(exact))):
                _walk(cube, said, rows, _exact(cube, [exact[i] for i in rows.tolist()], rows))
        return said.sentences()
    z = inside(cube, points.to(cube.device).double())
    said = Said(cube, len(z))
    everyone = torch.arange(len(z), device=z.device)
    if cube.unfold or cube.straight_through:
        with cube.doubled():
            _walk(cube, said, everyone, _bounds(cube, z, said, None))
        return said.sentences()
    for rows in parts(cube, everyone):
        _walk(cube, said, rows, _bounds(cube, z, said, cube.tolerance()))
    again = said.unsure.nonzero()[:, 0]
    if len(again):
        said.forget(again)
        with cube.doubled():
            for rows in parts(cube, again):
                _walk(cube, said, rows, _bounds(cube, z, said, None))
    return said.sentences()


def inside(cube: VolumeDecoder, z: Tensor) -> Tensor:
    """``z`` if it is in the cube, moved to its border with ``clip``."""
    if z.ndim != 2 or z.shape[1] != cube.latent_dim:
        width = z.shape[-1] if z.ndim else 0
        raise PointError(f"z has {width} coordinates, latent_dim is {cube.latent_dim}")
    if cube.clip:
        z = z.clamp(0, 1)
    bad = ~((z >= 0) & (z <= 1))
    if bool(bad.any()):
        row, axis = bad.nonzero()[0].tolist()
        value = float(z[row, axis])
        raise PointError(f"coordinate {axis} is {value:g}, outside [0, 1]; pass clip=true to clip")
    return z


def ancestral(cube: VolumeDecoder, count: int, generator: torch.Generator) -> Sentences:
    """Sentences sampled token by token from the same tables."""
    said = Said(cube, count)

    def choose(step: int, alive: Tensor, table: Tensor) -> Chosen:
        drawn = torch.randint(1 << cube.frequency_bits, (len(table), 1), generator=generator).to(table.device)
        token = torch.searchsorted(table.cumsum(1), drawn, right=True)
        return token[:, 0], table.gather(1, token)[:, 0], None

    for rows in parts(cube, torch.arange(count, device=cube.device)):
        _walk(cube, said, rows, choose)
    return said.sentences()


def parts(cube: VolumeDecoder, rows: Tensor) -> Sequence[Tensor]:
    """Rows that are stepped together."""
    return chunks(rows, cube.caps().vocab_size, ROWS, NUMBERS)


# ---- ways to choose
def _bounds(cube: VolumeDecoder, z: Tensor, said: Said, tolerance: float | None) -> Choose:
    """Bounds: the box shrinks and the point stays; ``unfold``: the point is rescaled and the box stays."""
    total = 1 << cube.frequency_bits
    low, high, point = torch.zeros_like(z), torch.ones_like(z), z.detach().clone()

    def choose(step: int, alive: Tensor, table: Tensor) -> Chosen:
        k = step % cube.latent_dim
        a, b, x = low[alive, k], high[alive, k], point[alive, k]
        token, start, count = token_at(a, b, x, table, total)
        unsure = None
        if cube.unfold:
            first, last = shares(start, count, total)
            point[alive, k] = (x - first) / (last - first)
        else:
            c, d = narrow(a, b, *shares(start, count, total))
            low[alive, k], high[alive, k] = c, d
            if tolerance is not None:
                unsure = torch.minimum(x - c, d - x) < tolerance
        if cube.straight_through:
            place = ((x - a) / (b - a)).clamp(0, 1) + (z[alive, k] - z[alive, k].detach())
            said.hot.append(_one_hot(token, place, table, total, alive, len(z)))
        return token, count, unsure

    return choose


def _one_hot(token: Tensor, place: Tensor, table: Tensor, total: int, alive: Tensor, count: int) -> Tensor:
    """[count,V]: the chosen token, with the gradient of a soft choice by nearness to the intervals' middles.

    ``place`` moves as the point does: the 1/width of its box is left out, or gradients would double with every bit.
    """
    middles = (table.cumsum(1) - table.double() / 2) / total
    near = -(place[:, None] - middles).abs() / SHARPNESS
    p = torch.softmax(near.masked_fill(table == 0, -torch.inf), 1)
    hard = torch.zeros_like(p).scatter(1, token[:, None], 1.0)
    return p.new_zeros(count, p.shape[1]).index_copy(0, alive, hard + p - p.detach())


def _exact(cube: VolumeDecoder, codes: Sequence[Sequence[Code]], rows: Tensor) -> Choose:
    for code in codes:
        if len(code) != cube.latent_dim:
            raise PointError(f"z has {len(code)} coordinates, latent_dim is {cube.latent_dim}")
        for axis, (numerator, bits) in enumerate(code):
            if not 0 <= numerator <= 1 << bits:
                raise PointError(f"coordinate {axis} is {numerator} / 2^{bits}, outside [0, 1]; it is no code")
    points = {row: Point(code, cube.frequency_bits) for row, code in zip(rows.tolist(), codes)}

    def choose(step: int, alive: Tensor, table: Tensor) -> Chosen:
        before = torch.nn.functional.pad(table.cumsum(1), (1, 0)).cpu().numpy().astype(np.int64)
        found = [points[i].choose(row) for i, row in zip(alive.tolist(), before)]
        token = torch.tensor(found, device=table.device)
        return token, table.gather(1, token[:, None])[:, 0], None

    return choose


# ---- the loop
def _walk(cube: VolumeDecoder, said: Said, rows: Tensor, choose: Choose) -> None:
    """Choose tokens until every row has ended; rows that end, or can't be told, leave the batch."""
    model, caps, device = cube.language_model, cube.caps(), cube.device
    alive, most = rows.to(device), said.tokens.shape[1]
    ends = torch.tensor(caps.eos_ids, device=device)
    with torch.no_grad():  # a straight-through gradient goes to the point, not to the model
        state = model.open(
            torch.full((len(alive), 1), int(caps.start_id or 0), device=device), None, None, max_length=most + 1
        )
    logits = state.logits
    for step in range(most):
        token, count, unsure = choose(step, alive, frequencies(logits, cube.banned, cube.frequency_bits))
        said.tokens[alive, step] = token
        said.lengths[alive] += 1
        said.bits[alive] += count.double().log2() - cube.frequency_bits
        over = torch.isin(token, ends)
        said.ended[alive] = over
        if unsure is not None:
            said.unsure[alive] = unsure
            over = over | unsure
        if step + 1 == most or bool(over.all()):
            break
        if bool(over.any()):
            stay = (~over).nonzero()[:, 0]
            alive, token = alive[stay], token[stay]
            model.rows(state, stay)
        with torch.no_grad():
            logits = model.step(state, token[:, None])[:, 0]
        model.keep(state, torch.zeros(len(alive), 1, dtype=torch.long))
