"""Beside a prediction run: keep what the drafter learnt, or forget it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from quire.errors import ConfigError
from quire.roles.language.accept import tiny_speculative
from quire_aded.drafter import TrigramTree


def drafters_of(model: Any) -> list[TrigramTree]:
    """Every TrigramTree inside the model, through unions too."""
    return [m for m in model.modules() if isinstance(m, TrigramTree)]


class SaveTrigrams(Callback):
    """Write the drafter's weights, corpus and observations joined, as safetensors with the tokenizer's fingerprint.

    For the drafter of Liu et al. 2024. The file holds token triples of what users wrote and were
    answered: treat it as their text. ``TrigramTree(corpus: FILE)`` reads it.

    Args:
        path: File, ending in .safetensors.
        every_n_batches: Batches of ``predict`` between two writes; 0 writes at the end only.

    Raises:
        ConfigError: another ending, ``every_n_batches`` below 0, or a sampler without TrigramTree.
    """

    def __init__(self, path: str = "trigrams.safetensors", every_n_batches: int = 0) -> None:
        super().__init__()
        if not path.endswith(".safetensors"):
            raise ConfigError(f"SaveTrigrams.path must end in .safetensors, got {path}")
        if every_n_batches < 0:
            raise ConfigError(f"SaveTrigrams.every_n_batches must be at least 0, got {every_n_batches}")
        self.path, self.every_n_batches = path, every_n_batches

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Nothing is written by fit."""
        run = tiny_speculative({}, {"class_path": "TrigramTree", "init_args": {"nodes": 8}})
        return {**run, "trainer": {"callbacks": [{"class_path": "SaveTrigrams"}]}}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a model without the drafter."""
        if not drafters_of(pl_module):
            raise ConfigError("SaveTrigrams needs model.sampler with a TrigramTree drafter")

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write now and then."""
        if self.every_n_batches and (batch_idx + 1) % self.every_n_batches == 0:
            self._save(trainer, pl_module)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Write at the end."""
        self._save(trainer, pl_module)

    def _save(self, trainer: Any, model: Any) -> None:
        store = drafters_of(model)[0].store
        if store is not None and trainer.is_global_zero:
            store.save(self.path)


class ForgetTrigrams(Callback):
    """Drop what ``TrigramTree`` observed before each prediction run; drafters with ``scope: run`` bring it along.

    For the drafter of Liu et al. 2024; the official code keeps everything.
    """

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Brought by the drafter; listed here as a user might."""
        run = tiny_speculative({}, {"class_path": "TrigramTree", "init_args": {"nodes": 8}})
        return {**run, "trainer": {"callbacks": ["ForgetTrigrams"]}}

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget."""
        for drafter in drafters_of(pl_module):
            if drafter.scope == "run":
                drafter.forget()
