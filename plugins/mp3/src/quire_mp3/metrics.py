"""Position accuracy and grid distance over a whole evaluation, exact over tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from quire.contracts import Batch, Losses, Metric
from quire.errors import ConfigError
from quire_mp3.modules import TINY, Guesses
from quire_mp3.objective import PositionPrediction

if TYPE_CHECKING:
    from quire.model import Model

SubsetName = Literal["all", "context", "rest", "nonconstant", "voiced"]


class TokenMean(Metric):
    """Mean of a number per token over one subset of the tokens. Subclass it and write ``values``."""

    objective: PositionPrediction
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, subset: SubsetName = "all") -> None:
        super().__init__()
        self.subset = subset
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Position prediction on digits, judged by this metric."""
        return {"model": {**TINY, "metrics": [cls.__name__]}, "data": "Digits"}

    @property
    def label(self) -> str:
        """Name in the log: the class, with the subset when it isn't all."""
        return type(self).__name__ + ("" if self.subset == "all" else f"_{self.subset}")

    def values(self, guesses: Guesses) -> Tensor:
        """[B,T] float."""
        raise NotImplementedError

    def observe(self, model: Model, batch: Batch, losses: Losses) -> None:
        """Add one batch's tokens. Raises ``ConfigError`` when the data has no such subset."""
        guesses: Guesses = losses.outputs["position"]
        if self.subset not in guesses.subsets:
            raise ConfigError(
                f"{type(self).__name__}.subset is {self.subset}, but this data has {', '.join(guesses.subsets)}"
            )
        self.update(self.values(guesses), guesses.subsets[self.subset])

    def update(self, values: Tensor, chosen: Tensor) -> None:
        """Add ``values`` [B,T] where ``chosen`` [B,T]."""
        self.total = self.total + (values * chosen).sum()
        self.count = self.count + chosen.sum()

    def compute(self) -> Tensor:
        """The mean; NaN when there was no such token."""
        return (self.total / self.count).float()


class PositionAccuracy(TokenMean):
    """Share of tokens whose likeliest cell is their own. Zhai et al. 2022. Chance is 1/N.

    Args:
        subset: ``all`` real tokens, those in the ``context``, the ``rest``, ``nonconstant`` patches of images, or
            ``voiced`` frames of recordings (within 30 dB of the loudest).

    Needs:
        objective: PositionPrediction.

    Returns:
        A scalar in [0,1], from logits [B,N,N].

    Raises:
        ConfigError: a subset that the data doesn't have.
    """

    higher_is_better = True

    def values(self, guesses: Guesses) -> Tensor:
        """1 where right."""
        return guesses.right


class GridDistance(TokenMean):
    """Mean Manhattan distance on the grid from the likeliest cell to the true one. Zhai et al. 2022.

    Args:
        subset: As in PositionAccuracy.

    Needs:
        objective: PositionPrediction.

    Returns:
        A scalar in cells, 0 when every token is right, from logits [B,N,N].

    Raises:
        ConfigError: a subset that the data doesn't have.
    """

    higher_is_better = False

    def values(self, guesses: Guesses) -> Tensor:
        """Cells between."""
        return guesses.distance
