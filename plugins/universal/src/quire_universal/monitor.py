"""Where the model thinks longer: mean steps by task, length and token. After Dehghani et al. 2018."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from quire.data import expand
from quire.errors import ConfigError
from quire_universal.decoder import UniversalDecoder
from quire_universal.encoder import UniversalEncoder
from quire_universal.halting import Ponder

BY = ("task", "length", "token")


class PonderMonitor(Callback):
    """Mean steps of halting positions by task, length and token, over validation and test batches.

    After Dehghani et al. 2018. Writes ``ponder.json`` beside the log: side (encoder, decoder), then group, then key:
    ``{"steps": mean, "positions": count}``. Task is the batch's ``label``, or the first token where there is none.

    Args:
        batches: Batches looked at in each evaluation; they are run once more for it.
        by: Some of task, length, token.
        path: File to write; null is ``ponder.json`` in the run's folder.

    Needs:
        A halting part, ACT for one, in the encoder or the decoder.

    Raises:
        ConfigError: ``batches`` below 1, an unknown group, or nothing that halts.
    """

    def __init__(self, batches: int = 8, by: list[str] | None = None, path: str | None = None) -> None:
        if batches < 1:
            raise ConfigError(f"PonderMonitor.batches must be at least 1, got {batches}")
        self.batches, self.by, self.path = batches, list(by or BY), path
        for name in self.by:
            if name not in BY:
                raise ConfigError(f"PonderMonitor.by holds some of {', '.join(BY)}, got {name!r}")
        self.sums: dict[str, dict[str, dict[str, list[float]]]] = {}

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Reverse three digits with ACT."""
        from quire_universal.objective import tiny_seq2seq

        run = tiny_seq2seq({"class_path": "ACT", "init_args": {"max_steps": 3}})
        return {**run, "trainer": {"callbacks": ["PonderMonitor"]}}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a model in which nothing halts."""
        parts = (pl_module.find(UniversalEncoder), pl_module.find(UniversalDecoder))
        if all(part is None or part.halting is None for part in parts):
            raise ConfigError("PonderMonitor needs a halting part, such as ACT, in model.encoder or model.decoder")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget the last evaluation."""
        self.sums = {}

    on_test_start = on_validation_start

    @torch.no_grad()
    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count one batch."""
        if batch_idx >= self.batches:
            return
        encoder, decoder = pl_module.find(UniversalEncoder), pl_module.find(UniversalDecoder)
        codes: Any = encoder(batch) if encoder is not None else None
        if encoder is not None and encoder.halting is not None and encoder.patch is None:
            ids = batch["source"] if "source" in batch else batch["tokens"]
            self._count("encoder", Ponder(codes.ponder, codes.steps, codes.mask), ids, batch)
        if decoder is not None and decoder.halting is not None:
            tokens, mask = batch["tokens"][:, :-1], batch.get("mask")
            mask = None if mask is None else mask[:, :-1]
            _, ponder = decoder.pondered(codes, tokens, mask)
            self._count("decoder", ponder, tokens, batch)

    on_test_batch_end = on_validation_batch_end

    def _count(self, side: str, ponder: Ponder, ids: Tensor, batch: Any) -> None:
        steps, mask = ponder.steps.cpu(), ponder.mask
        real = torch.ones_like(steps, dtype=torch.bool) if mask is None else mask.cpu()
        ids = ids.cpu()
        first = ids.gather(1, real.long().argmax(1, keepdim=True))
        task = batch["label"].cpu()[:, None] if "label" in batch else first
        keys = {"task": task.expand_as(ids), "length": real.sum(1, keepdim=True).expand_as(ids), "token": ids}
        for name in self.by:
            into = self.sums.setdefault(side, {}).setdefault(name, {})
            for key in keys[name][real].unique().tolist():
                here = real & (keys[name] == key)
                held = into.setdefault(str(key), [0.0, 0.0])
                held[0] += float(steps[here].sum())
                held[1] += float(here.sum())

    def table(self) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
        """Side → group → key → mean steps and positions, of the last evaluation."""
        return {
            side: {
                group: {
                    key: {"steps": total / count, "positions": count}
                    for key, (total, count) in sorted(held.items(), key=lambda item: int(item[0]))
                }
                for group, held in groups.items()
            }
            for side, groups in self.sums.items()
        }

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the table."""
        if not trainer.sanity_checking and self.sums:
            self._write(trainer)

    on_test_end = on_validation_end

    @rank_zero_only
    def _write(self, trainer: Any) -> None:
        file = expand(self.path) if self.path else Path(trainer.log_dir or trainer.default_root_dir) / "ponder.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.table(), indent=1) + "\n", encoding="utf-8")
