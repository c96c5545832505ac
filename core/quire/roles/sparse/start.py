"""The start of the decoder's bias: the geometric median of the first batch."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback

from quire.contracts import Batch
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.median import geometric_median
from quire.roles.sparse.ranks import rows_of_all_ranks


class StartBias(Callback):
    """Before the first step, put b_dec at the geometric median of the first batch's inputs, over all processes.

    A resumed run and loaded dictionaries keep theirs.
    """

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """At the first batch only."""
        if trainer.global_step or batch_idx or trainer.current_epoch:
            return
        encoder = pl_module.encoder.role(SparseEncoder)
        start(encoder, None if pl_module.decoder is None else pl_module.decoder.role(SparseDecoder), batch)


@torch.no_grad()
def start(encoder: SparseEncoder, decoder: SparseDecoder | None, batch: Batch) -> None:
    """Put the biases at the geometric medians of a batch's inputs and targets; a loaded decoder keeps its own."""
    if encoder.norm == "global_rms":  # the scalar first: the median is of normalised rows
        encoder.fit_norm(batch)
    was = encoder.training
    encoder.eval()
    x = encoder.normalised(batch)[0]
    target = encoder.target(batch, x)
    encoder.train(was)
    bias = None if decoder is None or "origin" in decoder.__dict__ else decoder.b_dec
    if encoder.b_dec is not None:
        encoder.b_dec.copy_(geometric_median(rows_of_all_ranks(x)))
    if bias is not None and bias is not encoder.b_dec:
        bias.copy_(geometric_median(rows_of_all_ranks(target)))
    if encoder.norm == "global_rms":  # the step that follows counts this batch
        encoder.forget_norm()
