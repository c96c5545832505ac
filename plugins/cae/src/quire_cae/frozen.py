"""Targets that a frozen network from a file gives: read when first needed, never trained, never in a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from quire.contracts import Batch, Spec
from quire.errors import ConfigError
from quire.roles.tokens.contract import Layout, Segment
from quire.roles.tokens.patches import pair
from quire.roles.tokens.reconstruct import Target


class FrozenTarget(Target):
    """A second, resized view of the same picture through a frozen network.

    The network is no submodule: a checkpoint doesn't hold it, the optimizer doesn't see it. How many codes or
    numbers it gives is remembered, so a checkpoint reloads when the file is gone.

    Args:
        size: Height and width of the second view in pixels; null fits the patch grid.
        width: Numbers or codes it gives; null asks the file.
    """

    def __init__(self, size: int | list[int] | None, width: int | None) -> None:
        super().__init__()
        self.view = None if size is None else pair(size, f"{type(self).__name__}.size")
        self.width = width
        self.refer("net", None)

    # ---- what a subclass writes
    recorded = "width"
    """Name of the argument that holds ``width``."""

    def read(self) -> nn.Module:
        """The network. Raises ``ConfigError`` naming the file and how to get it."""
        raise NotImplementedError

    def stride(self) -> int:
        """Pixels of the second view for each of the network's cells."""
        raise NotImplementedError

    def given(self) -> int:
        """Numbers or codes that the network gives."""
        raise NotImplementedError

    def look(self, net: Any, view: Tensor) -> Tensor:
        """Pictures [B,3,h,w] in [0,1] → [B,h',w'] ids or [B,h',w',F]."""
        raise NotImplementedError

    # ---- shared
    def size(self, spec: Spec) -> int:
        """F or V."""
        if self.width is None:
            self.width = self.given()
            self.init_args[self.recorded] = self.width
        return self.width

    @torch.no_grad()
    def forward(self, batch: Batch, layout: Layout) -> Tensor:
        """[B,N] or [B,N,F], in float32 whatever the run's precision: half precision ties codes."""
        segment = layout.only()
        image = _picture(batch, segment, self)
        net = self._net(image.device)
        step = self.stride()
        view = interpolate(
            image.float(),
            self.view or (segment.grid[0] * step, segment.grid[1] * step),
            mode="bicubic",
            antialias=True,
            align_corners=False,
        ).clamp(0, 1)
        with torch.autocast(image.device.type, enabled=False):
            found = self.look(net, view)
        grid = tuple(found.shape[1:3])
        if grid != segment.grid:
            a, b = ("x".join(map(str, g)) for g in (grid, segment.grid))
            raise ConfigError(f"tokenizer grid {a} differs from patch grid {b}: drop {type(self).__name__}.size")
        return found.flatten(1, 2)

    def _net(self, device: torch.device) -> nn.Module:
        net = self.__dict__["net"]
        if net is None:
            net = self.read().float().eval().requires_grad_(False)
        if next(net.parameters()).device != device:
            net = net.to(device)
        self.refer("net", net)
        return net


def _picture(batch: Batch, segment: Segment, asker: object) -> Tensor:
    if len(segment.grid) != 2 or segment.field != "image":
        name = type(asker).__name__
        raise ConfigError(f"{name} needs image patches; segment {segment.name!r} is cut from {segment.field}")
    image = batch["image"]
    return image.expand(-1, 3, -1, -1) if image.shape[1] == 1 else image
