"""Beside the training loop: what the sampler would draft by now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_only

from quire.errors import ConfigError
from quire.roles.language.contract import StepModel
from quire_superposed.prompts import prompts_and_truth
from quire_superposed.sampler import Superposed


class PreviewDrafts(Callback):
    """Write ranked drafts of a few validation prompts every few epochs. Shen et al. 2024.

    Files are ``drafts/epoch-0001.txt`` beside the run's log; loggers that take text (TensorBoard) get them too.

    Args:
        prompts: Prompts shown, the first of the validation split.
        every_n_epochs: Epochs between two files.

    Needs:
        sampler: Superposed.

    Raises:
        ConfigError: an argument below 1, or another sampler.
    """

    def __init__(self, prompts: int = 4, every_n_epochs: int = 1) -> None:
        super().__init__()
        if prompts < 1 or every_n_epochs < 1:
            raise ConfigError(
                f"PreviewDrafts needs prompts >= 1 and every_n_epochs >= 1, got {prompts} and {every_n_epochs}"
            )
        self.prompts, self.every_n_epochs = prompts, every_n_epochs

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Drafts after each epoch on the standard library's text."""
        run = Superposed.tiny()
        return {**run, "trainer": {"callbacks": [{"class_path": "PreviewDrafts", "init_args": {"prompts": 2}}]}}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse another sampler."""
        if not isinstance(pl_module.sampler, Superposed):
            have = "is not set" if pl_module.sampler is None else f"is {type(pl_module.sampler).__name__}"
            raise ConfigError(f"PreviewDrafts needs Superposed; model.sampler {have}")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Every few epochs."""
        done = trainer.current_epoch + 1
        log = trainer.log_dir  # asked on every rank: Lightning broadcasts it
        if done % self.every_n_epochs == 0 and not trainer.fast_dev_run:
            self._write(trainer, pl_module, Path(log or trainer.default_root_dir), done)

    @rank_zero_only
    def _write(self, trainer: Any, model: Any, folder: Path, epoch: int) -> None:
        text = self.text(model, trainer.datamodule)
        file = folder / "drafts" / f"epoch-{epoch:04d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        for logger in trainer.loggers:
            if hasattr(getattr(logger, "experiment", None), "add_text"):
                logger.experiment.add_text("drafts", text, trainer.global_step)

    @torch.no_grad()
    def text(self, model: Any, source: Any) -> str:
        """Each prompt, and below it its drafts with exp(-score), the best first."""
        batch = next(iter(source.loader("val", batch_size=min(self.prompts, len(source.dataset("val"))))))
        batch = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        training = model.training
        model.eval()
        try:
            found = model.sampler(model, batch)
        finally:
            model.train(training)
        prompts, _ = prompts_and_truth(batch, model.decoder.role(StepModel).caps(), model.sampler.prompt)
        decode = getattr(getattr(model, "tokenizer", None), "decode", str)
        lines = []
        for prompt, drafts, scores in zip(prompts, found.tokens, found.scores):
            lines.append(repr(decode(prompt)))
            lines += [f"  {2.718281828**-s:10.4g}  {decode(d)!r}" for d, s in zip(drafts, scores)]
        return "\n".join(lines) + "\n"
