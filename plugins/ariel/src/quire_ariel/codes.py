"""What the two sides of the code give: boxes with a point in each, and sentences. Celotti et al. 2020."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quire.contracts import Codes
from quire.roles.latent.contract import VectorCodes
from quire_ariel.exact import Code


@dataclass
class VolumeCodes(VectorCodes):
    """A box of the cube for each sentence, and a point in it.

    Attributes:
        vector: [B,d] float32: ``z`` rounded, for parts of other papers; it holds about 22 bits an axis.
        z: [B,d] float64, the point that decodes to the sentence.
        low: [B,d] float64, the box's lower corner, inside; to the model's precision (``VolumeDecoder.box`` is exact).
        high: [B,d] float64, its upper corner, outside.
        log2_volume: [B] float64, log2 of the sentence's probability: also the checksum of the tables along it.
        axis_bits: [B,d] float64, bits on each axis.
        exact: One list of (numerator, bits) a sentence with ``arithmetic: exact``, else None. ``z`` is then only near.
    """

    z: Tensor
    low: Tensor
    high: Tensor
    log2_volume: Tensor
    axis_bits: Tensor
    exact: list[list[Code]] | None = None


@dataclass
class Sentences(Codes):
    """What points decode to.

    Attributes:
        tokens: [B,T] int64, the end token included, padding behind.
        mask: [B,T] bool, True = real.
        truncated: [B] bool: ``max_length`` came before an end token.
        log2_volume: [B] float64 of the box that the point lies in.
        differs: [B] bool: the code was made with other tables, so this may be another sentence.
        one_hot: [B,T,V] float64 with a straight-through gradient to the points, or None.
    """

    tokens: Tensor
    mask: Tensor
    truncated: Tensor
    log2_volume: Tensor
    differs: Tensor
    one_hot: Tensor | None = None

    def rows(self) -> list[list[int]]:
        """Ids of each sentence, the end token included."""
        return [t[m].tolist() for t, m in zip(self.tokens, self.mask)]

    def __len__(self) -> int:
        return len(self.tokens)
