"""The memory order of linear weights while decoding: on a CPU a product of one row waits for the matrix to be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import nn


@contextmanager
def laid_out(module: nn.Module) -> Iterator[int]:
    """Keep the linear weights of a module column by column, as MKL reads them fastest for a pass of one token.

    Shapes, names and values stay; a weight takes its memory once more while it is copied. Does nothing on a GPU, in
    other types than float32 and without MKL. Gives the number of weights.
    """
    weights = [w for m in module.modules() if type(m) is nn.Linear and _turnable(w := m.weight)]
    for weight in weights:
        weight.data = weight.data.t().contiguous().t()
    try:
        yield len(weights)
    finally:
        for weight in weights:
            weight.data = weight.data.contiguous()


def _turnable(weight: Any) -> bool:
    plain = type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and weight.is_contiguous() and torch.backends.mkl.is_available()


class DecodingLayout(Callback):
    """``laid_out`` for the decoder of a prediction run; every step model brings it."""

    def __init__(self) -> None:
        self.layout: AbstractContextManager[Any] = nullcontext()

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Lay the weights out."""
        if pl_module.decoder is not None:
            self.layout = laid_out(pl_module.decoder)
            self.layout.__enter__()

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Put them back."""
        self.layout.__exit__(None, None, None)
        self.layout = nullcontext()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put them back."""
        self.on_predict_end(trainer, pl_module)
