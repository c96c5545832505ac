"""Give dead latents a new life at inputs that are rebuilt badly."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.nn.functional import normalize

from quire.data import mix
from quire.errors import ConfigError
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.ranks import rows_of_all_ranks, sum_over_ranks
from quire.roles.sparse.selector import tiny_run

log = logging.getLogger(__name__)


class Resample(Callback):
    """Now and then restart dead latents at badly rebuilt inputs, as attention-output SAEs do. Kissane et al. 2024.

    Dead is a latent that fired on at most ``cutoff`` of the tokens since the last resampling (arXiv 2406.17759). Inputs
    are drawn from the ``batches`` before it without replacement, with probability proportional to the square of their
    squared error. A latent's decoder row becomes the unit direction of an input less b_dec, its encoder row that
    direction at ``scale`` times the mean norm of live encoder rows, its bias 0, its moments in the optimizer 0. Live
    latents are not touched.

    Args:
        every: Steps between resamplings.
        times: Most resamplings.
        cutoff: Largest share of tokens on which a dead latent fired.
        batches: Batches before a resampling that inputs are drawn from.
        scale: Norm of a new encoder row, in mean norms of live ones.

    Raises:
        ConfigError: a number below 1, a negative cutoff or scale, or a transcoder.
    """

    encoder: SparseEncoder
    decoder: SparseDecoder

    def __init__(
        self, every: int = 25_000, times: int = 4, cutoff: float = 1e-6, batches: int = 100, scale: float = 0.2
    ) -> None:
        if min(every, times, batches) < 1 or cutoff < 0 or scale <= 0:
            raise ConfigError("Resample needs every, times and batches of at least 1, cutoff >= 0 and scale > 0")
        self.every, self.times, self.cutoff, self.batches, self.scale = every, times, cutoff, min(batches, every), scale
        self.steps: list[int] = []
        self._fired: Tensor | None = None
        self._tokens = 0
        self._keys: Tensor | None = None
        self._rows: Tensor | None = None
        self._step = 0

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Planted features, resampled after two steps."""
        run = tiny_run({"class_path": "TopK", "init_args": {"k": 2}})
        return {**run, "trainer": {"callbacks": [{"class_path": "Resample", "init_args": {"every": 2}}]}}

    # ---- resume
    def state_dict(self) -> dict[str, Any]:
        """Counters, candidates and the steps resampled at."""
        names = ("steps", "_fired", "_tokens", "_keys", "_rows", "_step")
        return {n: list(v) if isinstance(v := getattr(self, n), list) else v for n in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue."""
        for name, value in state_dict.items():
            setattr(self, name, value)

    # ---- training
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count; remember candidates; resample when it is time."""
        found = outputs.get("outputs", {}) if isinstance(outputs, dict) else {}
        if "errors" not in found or len(self.steps) >= self.times:
            return
        encoder, decoder = pl_module.encoder.role(SparseEncoder), pl_module.decoder.role(SparseDecoder)
        if encoder.target_width is not None:
            raise ConfigError("Resample restarts rows at inputs, but a transcoder's rows are another site's: drop it")
        self._fired = found["fired"] if self._fired is None else self._fired.to(found["fired"].device) + found["fired"]
        self._tokens += found["tokens"]
        place = trainer.global_step % self.every
        if place == 0 or place > self.every - self.batches:
            key = mix(pl_module.seed, trainer.global_step, batch_idx, trainer.global_rank)
            self._remember(found["x"], found["errors"], key, decoder.latents)
        if place == 0 and trainer.global_step > self._step:
            self._step = trainer.global_step
            optimizers = trainer.optimizers
            restarted = self._resample(encoder, decoder, optimizers[0] if optimizers else None)
            if restarted:
                self.steps.append(trainer.global_step)
                log.info("step %d: %d dead latents restarted", trainer.global_step, restarted)

    @torch.no_grad()
    def _remember(self, x: Tensor, errors: Tensor, seed: int, most: int) -> None:
        keys = race_keys(errors, seed)
        self._keys = keys if self._keys is None else torch.cat([self._keys.to(keys), keys])
        self._rows = x.detach() if self._rows is None else torch.cat([self._rows.to(x), x.detach()])
        kept = self._keys.topk(min(most, len(self._keys)), largest=False).indices
        self._keys, self._rows = self._keys[kept], self._rows[kept]

    @torch.no_grad()
    def _resample(self, encoder: SparseEncoder, decoder: SparseDecoder, optimizer: Any) -> int:
        assert self._fired is not None and self._keys is not None and self._rows is not None
        tokens = float(sum_over_ranks(self._fired.new_tensor([self._tokens])))
        dead = sum_over_ranks(self._fired) <= self.cutoff * tokens
        keys, rows = rows_of_all_ranks(self._keys), rows_of_all_ranks(self._rows)
        self._fired, self._tokens, self._keys, self._rows = None, 0, None, None
        count, usable = int(dead.sum()), keys.isfinite()
        if not count:
            return 0
        if not bool(usable.any()):
            log.warning("every input is rebuilt without error: no latent is restarted")
            return 0
        order = keys[usable].argsort()[:count]
        if len(order) < count:
            log.warning("%d dead latents but %d inputs: some are used again", count, len(order))
            order = order.repeat(-(-count // len(order)))[:count]
        restart(encoder, decoder, dead, rows[usable][order], self.scale, optimizer)
        return count


@torch.no_grad()
def race_keys(errors: Tensor, seed: int) -> Tensor:
    """[N] arrival times: the first n are a draw of n rows without replacement, each in proportion to its error squared.

    A row without error never arrives (infinity).
    """
    weights = errors.double().square()
    waits = torch.empty(len(errors), dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(seed))
    return torch.where(weights > 1e-12, waits.to(weights.device) / weights.clamp(min=1e-300), torch.inf)


@torch.no_grad()
def restart(
    encoder: SparseEncoder, decoder: SparseDecoder, dead: Tensor, rows: Tensor, scale: float, optimizer: Any = None
) -> None:
    """Restart the latents of ``dead`` [F] at normalised inputs ``rows`` [#dead,D]."""
    bias = decoder.b_dec if decoder.b_dec is not None else 0
    directions = normalize(rows - bias, dim=1)
    alive = encoder.W_enc[~dead].norm(dim=1)
    norm = alive.mean() if len(alive) else torch.ones((), device=rows.device)
    decoder.W_dec[dead] = directions.to(decoder.W_dec.dtype)
    encoder.W_enc[dead] = (directions * norm * scale).to(encoder.W_enc.dtype)
    if encoder.b_enc is not None:
        encoder.b_enc[dead] = 0
    decoder.tokens_since_fired[dead] = 0
    state = {} if optimizer is None else optimizer.state
    for parameter in (encoder.W_enc, encoder.b_enc, decoder.W_dec):
        for value in state.get(parameter, {}).values() if parameter is not None else ():
            if isinstance(value, Tensor) and value.shape == parameter.shape:  # type: ignore[union-attr]
                value[dead] = 0
