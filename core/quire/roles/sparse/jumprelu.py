"""JumpReLU: a threshold per latent, learned through a straight-through estimator."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from quire.contracts import Spec
from quire.errors import ConfigError
from quire.roles.sparse.codes import SparseCodes
from quire.roles.sparse.selector import Selection, Selector, tiny_run


class _Values(torch.autograd.Function):
    """p where p > theta, else 0; theta's gradient by a rectangle of width ``bandwidth`` around it."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.bandwidth = bandwidth
        return pre * (pre > theta)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        pre, theta = ctx.saved_tensors
        near = ((pre - theta) / ctx.bandwidth).abs() < 0.5
        return upstream * (pre > theta), -(theta / ctx.bandwidth) * (near * upstream).sum(0), None


class _Count(torch.autograd.Function):
    """[N] how many p exceed theta, with the same rectangle."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.bandwidth = bandwidth
        return (pre > theta).to(pre.dtype).sum(1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        pre, theta = ctx.saved_tensors
        near = ((pre - theta) / ctx.bandwidth).abs() < 0.5
        return None, -(1 / ctx.bandwidth) * (near * upstream[:, None]).sum(0), None


class JumpReLU(Selector):
    """Keep a latent above its own learned threshold, unshrunk. Rajamanoharan et al. 2024, arXiv 2407.14435.

    Args:
        init: Every threshold at the start, above 0.
        bandwidth: Width of the window around the threshold inside which it gets a gradient, above 0.

    Returns:
        Dense codes [N,F], 0 at the threshold itself, with ``count`` for an l0 term.

    Raises:
        ConfigError: ``init`` or ``bandwidth`` not above 0.
    """

    counts = True
    needs_pre = True
    exports = "jumprelu"

    def __init__(self, init: float = 1e-3, bandwidth: float = 1e-3) -> None:
        super().__init__()
        if init <= 0 or bandwidth <= 0:
            raise ConfigError(f"JumpReLU.init and bandwidth must be above 0, got {init} and {bandwidth}")
        self.init, self.bandwidth = init, bandwidth

    def build(self, spec: Spec) -> None:
        """Make the thresholds [F], kept as logarithms."""
        self.log_threshold = nn.Parameter(torch.full((int(spec.need("latents", self)),), math.log(self.init)))

    @property
    def threshold(self) -> Tensor:
        """[F], above 0."""
        return self.log_threshold.exp()

    def select(self, z: Tensor, context: Selection) -> SparseCodes:
        """Pre-activations above the threshold."""
        theta, pre = self.threshold, context.pre
        assert pre is not None
        values: Tensor = _Values.apply(pre, theta, self.bandwidth)
        count: Tensor = _Count.apply(pre, theta, self.bandwidth)
        return SparseCodes(values, None, z.shape[1], count=count)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """With an l0 term and a window wide enough for a run of seconds."""
        selector = {"class_path": "JumpReLU", "init_args": {"init": 0.1, "bandwidth": 0.5}}
        return tiny_run(selector, {"class_path": "SparseReconstruction", "init_args": {"l0": 0.01}})
