"""A language model run in float64 for a while: batch, padding and cache then no longer change its probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def in_double(module: nn.Module) -> Iterator[None]:
    """Give every floating parameter and buffer of ``module`` float64 values; the old tensors come back at the end.

    There is no second model: the same parameters hold other values meanwhile, so don't train inside.
    """
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    with torch.inference_mode(False), torch.no_grad():
        held = [t.data for t in tensors]
        for t, data in zip(tensors, held):
            t.data = data.double()
    try:
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():
            for t, data in zip(tensors, held):
                t.data = data


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In eval mode meanwhile."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
