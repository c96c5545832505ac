"""Sentences to boxes: one teacher-forced pass, integer tables, then the axes in turn. Celotti et al. 2020."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quire_ariel import exact
from quire_ariel.boxes import axis_bits, dims_for, middle, narrow
from quire_ariel.codes import VolumeCodes
from quire_ariel.errors import CapacityError, ZeroVolumeError
from quire_ariel.rows import chunks, quoted, sentences
from quire_ariel.tables import frequencies

if TYPE_CHECKING:
    from quire_ariel.decoder import VolumeDecoder

ROWS, NUMBERS = 128, 1 << 22
"""Most sentences, and most probabilities, of one pass."""


@dataclass(frozen=True)
class Asked:
    """What is wanted of a sentence.

    Attributes:
        ended: It must end with an end token.
        point: A point of its box; else only the box, exactly, or its volume.
        bounded: The box must fit into the arithmetic.
        add_eos: Put the end token where there is none.
        gradients: Keep them, to the language model.
    """

    ended: bool = True
    point: bool = True
    bounded: bool = True
    add_eos: bool = False
    gradients: bool = False


@dataclass
class Parts:
    """The tokens' parts of their axes, each [B,T]; 0 behind the end.

    Attributes:
        start: What comes before the token in its table, int64.
        count: Its frequency, int64.
        low: ``start`` as a share, float64, with gradients where asked.
        width: ``count`` as a share, the same.
    """

    start: Tensor
    count: Tensor
    low: Tensor
    width: Tensor

    def take(self, rows: Tensor, other: Parts) -> None:
        """These rows from another's."""
        for name in ("start", "count", "low", "width"):
            getattr(self, name)[rows, : other.start.shape[1]] = getattr(other, name)


def encode(cube: VolumeDecoder, tokens: Tensor, mask: Tensor | None, asked: Asked) -> VolumeCodes:
    """The boxes of sentences [B,T].

    The model's own precision decides where that is safe; sentences with a narrow box are encoded again with the model
    in float64, and so is everything with exact arithmetic or where the box itself is asked for.
    """
    mask = None if mask is None else mask.to(cube.device)
    ids, lengths = sentences(tokens.to(cube.device), mask, cube.caps(), asked.ended, asked.add_eos)
    _refuse_tokens(cube, lengths, asked)
    real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    if not asked.gradients and (cube.arithmetic == "exact" or not asked.point):
        with cube.doubled():
            found = _parts(cube, ids, lengths, False)
    else:
        found = _parts(cube, ids, lengths, asked.gradients)
    low, high = _boxes(cube, found, real)
    narrow_ = ((high - low).amin(1) < 4 * cube.tolerance()).nonzero()[:, 0]
    if len(narrow_) and asked.point and not asked.gradients and cube.arithmetic != "exact":
        with cube.doubled():
            found.take(narrow_, _parts(cube, ids[narrow_], lengths[narrow_], False))
        low[narrow_], high[narrow_] = (side[narrow_] for side in _boxes(cube, found, real))
    _refuse_empty(cube, ids, real & (found.count == 0))
    bits = torch.where(real, cube.frequency_bits - found.count.double().log2(), 0.0)
    on_axes = axis_bits(bits, cube.latent_dim)
    if asked.bounded:
        _refuse_long(cube, bits, on_axes, (high <= low) & (cube.arithmetic == "float64"))
    z, codes = middle(low, high), None
    if cube.arithmetic == "exact" and asked.point:
        pairs = [list(zip(s, c)) for s, c in zip(found.start.tolist(), found.count.tolist())]
        codes = [exact.encode(p[:n], cube.latent_dim, cube.frequency_bits) for p, n in zip(pairs, lengths.tolist())]
        z = z.new_tensor([[exact.to_float(c) for c in code] for code in codes])
    return VolumeCodes(z.float(), z, low, high, -bits.sum(1), on_axes, codes)


def _parts(cube: VolumeDecoder, ids: Tensor, lengths: Tensor, gradients: bool) -> Parts:
    """One teacher-forced pass. Rows of like length share it, so little is spent on padding."""
    starts, counts = torch.zeros_like(ids), torch.zeros_like(ids)
    extra: list[tuple[Tensor, ...]] = []
    order = lengths.argsort(stable=True)
    opening = ids.new_tensor(cube.caps().start_id)
    total = 1 << cube.frequency_bits
    for rows in chunks(order, ids.shape[1] * cube.caps().vocab_size, ROWS, NUMBERS):
        width = int(lengths[rows[-1]])
        some = ids[rows, :width]
        real = torch.arange(width, device=ids.device) < lengths[rows][:, None]
        given = torch.cat([opening.expand(len(rows), 1), some[:, :-1]], 1)
        logits = cube.language_model(None, given, None).float()[real]  # padding behind changes nothing before it
        said = some[real][:, None]
        f = frequencies(logits.detach(), cube.banned, cube.frequency_bits)
        count = f.gather(1, said)[:, 0]
        start = f.cumsum(1).gather(1, said)[:, 0] - count
        row, place = real.nonzero(as_tuple=True)
        row = rows[row]
        starts[row, place], counts[row, place] = start, count
        if gradients:
            p = torch.softmax(logits.double().index_fill(1, cube.banned, -torch.inf), -1)
            before = (p * (torch.arange(p.shape[1], device=p.device) < said)).sum(1)
            own = p.gather(1, said)[:, 0]
            extra.append((row, place, before - before.detach(), own - own.detach()))
    low, share = starts.double() / total, counts.double() / total  # exact
    if gradients:
        row, place, before, own = (torch.cat(column) for column in zip(*extra))
        low, share = low.index_put((row, place), before, True), share.index_put((row, place), own, True)
    return Parts(starts, counts, low, share)


def _boxes(cube: VolumeDecoder, found: Parts, real: Tensor) -> tuple[Tensor, Tensor]:
    d, ends = cube.latent_dim, found.low + found.width
    zero = found.low.new_zeros(len(found.low))
    low, high = [zero] * d, [zero + 1] * d
    for t in range(real.shape[1]):
        k = t % d
        a, b = narrow(low[k], high[k], found.low[:, t], ends[:, t])  # both from the old low
        low[k], high[k] = a.where(real[:, t], low[k]), b.where(real[:, t], high[k])
    return torch.stack(low, 1), torch.stack(high, 1)


# ---- what is refused
def _refuse_tokens(cube: VolumeDecoder, lengths: Tensor, asked: Asked) -> None:
    row, most = int(lengths.argmax()), cube.caps().positions_max
    have = int(lengths[row])
    if asked.point and have > cube.max_length:
        raise CapacityError(f"sentence {row} has {have} tokens, the cube decodes {cube.max_length}: raise max_length")
    if most is not None and have > most:
        raise CapacityError(f"sentence {row} has {have} tokens, the language model takes {most}: shorten it")


def _refuse_empty(cube: VolumeDecoder, ids: Tensor, empty: Tensor) -> None:
    if not bool(empty.any()):
        return
    row, place = empty.nonzero()[0].tolist()
    say = cube.speech()
    token, before = quoted(ids[row, place : place + 1].tolist(), say), quoted(ids[row, :place].tolist(), say)
    raise ZeroVolumeError(f"token {token} has probability 0 after {before}; its volume is empty, set smoothing")


def _refuse_long(cube: VolumeDecoder, bits: Tensor, on_axes: Tensor, empty: Tensor) -> None:
    capacity = cube.capacity_bits()
    worst = on_axes.masked_fill(~empty, -1.0) if bool(empty.any()) else on_axes
    if float(worst.max()) > capacity or bool(empty.any()):
        row, axis = divmod(int(worst.argmax()), on_axes.shape[1])
        least = dims_for(bits[row], math.floor(min(capacity, 50.0)))
        raise CapacityError(
            f"sentence {row} needs {float(worst[row, axis]):.1f} bits on axis {axis}, float64 holds {capacity:.0f};"
            f" use latent_dim >= {least} or arithmetic=exact"
        )
