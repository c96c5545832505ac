"""Decoder rows of norm 1: projected gradients before the optimizer's step, renormalised rows after it."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from quire.data import mix
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.selector import tiny_run

log = logging.getLogger(__name__)


class UnitNormRows(Callback):
    """Keep each row of the decoder at norm 1, once per optimizer step; the decoder brings it along.

    Before the step each row's gradient loses its part along the row, so the optimizer's moments hold no length; after
    the step rows are divided by their norm. A row of zeros is drawn anew and logged.
    """

    decoder: SparseDecoder

    def __init__(self) -> None:
        self._step = -1

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Planted features, TopK with k = 2."""
        run = tiny_run({"class_path": "TopK", "init_args": {"k": 2}})
        return {**run, "trainer": {"callbacks": ["UnitNormRows"]}}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Count from here."""
        self._step = trainer.global_step

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Remove from the gradient its part along each row."""
        rows = pl_module.decoder.role(SparseDecoder).W_dec
        project(rows, rows.grad)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Divide the rows by their norms, if the optimizer has stepped."""
        if trainer.global_step == self._step:  # gradients are being accumulated
            return
        self._step = trainer.global_step
        looks = pl_module.device.type == "cpu" or self._step % trainer.log_every_n_steps == 0
        renormalise(pl_module.decoder.role(SparseDecoder).W_dec, mix(pl_module.seed, self._step) if looks else None)


@torch.no_grad()
def project(rows: Tensor, gradient: Tensor | None) -> None:
    """Make each row's gradient [F,D] orthogonal to the row, in place."""
    if gradient is not None:
        along = torch.linalg.vecdot(gradient, rows) / torch.linalg.vecdot(rows, rows).clamp(min=1e-30)
        gradient.addcmul_(rows, along[:, None], value=-1)


@torch.no_grad()
def renormalise(rows: Tensor, seed: int | None = 0) -> None:
    """Bring every row to norm 1, in place.

    Args:
        rows: [F,D].
        seed: Seed of the rows drawn in place of rows of zeros, the same on every process; None leaves those.
    """
    norms = rows.norm(dim=1, keepdim=True)
    if seed is not None:
        empty = (norms[:, 0] == 0).nonzero()[:, 0]
        if len(empty):
            log.warning("decoder rows %s had norm 0: drawn anew", empty.tolist()[:8])
            drawn = torch.randn(len(empty), rows.shape[1], generator=torch.Generator().manual_seed(seed))
            rows[empty] = drawn.to(rows)
            norms = rows.norm(dim=1, keepdim=True)
    rows.div_(norms.clamp(min=1e-30))
