"""Pictures at the end of fit: a few samples are kept, a subclass draws them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from quire.contracts import Batch, Objective
from quire.errors import ConfigError
from quire.matching import refusal


class EndPictures(Callback):
    """Base of callbacks that draw the first samples of the validation split when a fit ends. Write ``draw``.

    It keeps the first samples of a training batch, in case there is no validation. The model is in eval mode without
    gradients inside ``draw``; the run's own randomness isn't touched.

    Attributes:
        objective: The objective it needs.

    Args:
        images: Number of samples.
        file: Name of the PNG, beside the run's log.
        seed: Of what is drawn at random.

    Raises:
        ConfigError: ``images`` below 1, or another objective.
    """

    objective: Objective
    transformed: ClassVar[bool] = False
    """Whether samples go through the data module's transforms, as in validation."""

    def __init__(self, images: int, file: str, seed: int) -> None:
        super().__init__()
        if images < 1:
            raise ConfigError(f"{type(self).__name__}.images must be at least 1, got {images}")
        self.images, self.file, self.seed = images, file, seed
        self._seen: dict[str, Batch] = {}

    # ---- what a subclass writes
    def draw(self, model: Any, batch: Batch, folder: Path) -> dict[Path, str]:
        """Write pictures; what is to be said of each file. Empty where this model or batch has none."""
        raise NotImplementedError

    # ---- Lightning
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse an encoder or objective that it can't draw."""
        for slot in ("encoder", "objective"):
            said = refusal(type(self), slot, getattr(pl_module, slot))  # type: ignore[arg-type]
            if said:
                raise ConfigError(said)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep the first samples, in case there is no validation."""
        self._keep("train", batch)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the first samples."""
        self._keep("val", batch)

    @torch.no_grad()
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw, on one rank, and say where."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asked on every rank: it waits for rank 0
        batch = self._seen.get("val", self._seen.get("train"))
        here = trainer.is_global_zero and isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
        if batch is None or not here:  # a sharded model can't run on one rank
            return
        source = trainer.datamodule
        if self.transformed and source is not None and source.transforms:
            batch = source.transform(batch, self.generator(pl_module.device), training=False)
        training = pl_module.training
        pl_module.eval()
        with trainer.precision_plugin.forward_context():
            said = self.draw(pl_module, batch, folder)
        pl_module.train(training)
        for path, text in said.items():
            print(f"{path}: {text}")

    # ---- inside
    def _keep(self, split: str, batch: Any) -> None:
        if split not in self._seen:
            few = {k: v[: self.images].clone() for k, v in batch.items() if isinstance(v, Tensor) and v.ndim}
            self._seen[split] = few

    def generator(self, device: Any) -> torch.Generator:
        """A stream of its own."""
        return torch.Generator(device).manual_seed(self.seed)
