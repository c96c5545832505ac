"""Which latents have not fired for long: counted in tokens of all processes."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback

from quire.errors import ConfigError
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.ranks import ranks, sum_over_ranks
from quire.roles.sparse.selector import tiny_run


class DeadLatents(Callback):
    """Count the tokens since each latent last fired, and log the share that is dead.

    A latent fires when its value is above 0 for a token of any process; being selected with a 0 is not firing. Nothing
    waits for the device: the counters stay there. SparseReconstruction brings it along.

    Args:
        window: Tokens without firing after which a latent counts as dead.

    Raises:
        ConfigError: ``window`` below 1.
    """

    decoder: SparseDecoder

    def __init__(self, window: int = 10_000_000) -> None:
        if window < 1:
            raise ConfigError(f"DeadLatents.window must be at least 1 token, got {window}")
        self.window = window

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Planted features, TopK with k = 2."""
        run = tiny_run({"class_path": "TopK", "init_args": {"k": 2}})
        return {**run, "trainer": {"callbacks": [{"class_path": "DeadLatents", "init_args": {"window": 64}}]}}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count one batch."""
        found = outputs.get("outputs", {}) if isinstance(outputs, dict) else {}
        decoder = pl_module.decoder.role(SparseDecoder)
        if "fired" in found:
            count(decoder, found["fired"], found["tokens"])
            if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
                pl_module.log("train/dead", decoder.dead(self.window).float().mean())


@torch.no_grad()
def count(decoder: SparseDecoder, fired: torch.Tensor, tokens: int) -> None:
    """Add one batch to the counters.

    Args:
        decoder: Whose ``tokens_since_fired``.
        fired: [F] on how many of this process' tokens each latent was active.
        tokens: This process' tokens.
    """
    since = decoder.tokens_since_fired
    decoder.counted = None if decoder.counted is None else decoder.counted + tokens * ranks()
    if ranks() > 1:
        summed = sum_over_ranks(torch.cat([(fired > 0).long(), fired.new_tensor([tokens])]))
        fired, total = summed[:-1], summed[-1]
        since.copy_(torch.where(fired > 0, 0, since + total))
    else:
        since.copy_(torch.where(fired > 0, 0, since + tokens))
