"""The same code in whole numbers, without any rounding: sentences of any length on any number of axes.

After Celotti et al. 2020; one axis of it is plain arithmetic coding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Code = tuple[int, int]
"""(numerator, bits): the point numerator / 2^bits of one axis."""


def encode(intervals: Sequence[tuple[int, int]], dims: int, bits: int) -> list[Code]:
    """A point of the box of a sentence: on each axis the shortest binary fraction that surely fits.

    Args:
        intervals: For each token what comes before it and its own frequency, out of 2^bits.
        dims: Axes.
        bits: Of the tables.
    """
    low, width, held = [0] * dims, [1] * dims, [0] * dims
    for t, (start, count) in enumerate(intervals):
        k = t % dims
        low[k] = (low[k] << bits) + width[k] * start
        width[k] *= count
        held[k] += bits
    return [_shortest(*axis) for axis in zip(low, width, held)]


def _shortest(low: int, width: int, held: int) -> Code:
    need = max(held - width.bit_length() + 1, 0)  # 2^-need is at most the width
    return -((-low) >> (held - need)), need  # the lowest multiple that is not below


class Point:
    """A point on its way through the tables.

    Args:
        codes: One for each axis.
        bits: Of the tables.
    """

    def __init__(self, codes: Sequence[Code], bits: int) -> None:
        self.rest = [n for n, _ in codes]
        self.width = [1 << b for _, b in codes]
        self.bits, self.step = bits, 0

    def choose(self, cumulative: np.ndarray) -> int:
        """The next token: its interval of ``cumulative`` (V+1 integers from 0 to 2^bits) holds the point."""
        k = self.step % len(self.rest)
        self.step += 1
        scaled = self.rest[k] << self.bits
        place = min(scaled // self.width[k], (1 << self.bits) - 1)  # the upper end of the cube: the last token
        token = int(np.searchsorted(cumulative, place, side="right")) - 1
        start, end = int(cumulative[token]), int(cumulative[token + 1])
        self.rest[k] = scaled - self.width[k] * start
        self.width[k] *= end - start
        return token


def of_float(z: float) -> Code:
    """A float64 as an exact fraction."""
    numerator, denominator = z.as_integer_ratio()
    return numerator, denominator.bit_length() - 1


def to_float(code: Code) -> float:
    """The nearest float64."""
    numerator, bits = code
    return numerator / (1 << bits)
