"""Principal components as a fixed code."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from quire.contracts import Batch, Spec
from quire.errors import ConfigError
from quire.roles.latent.contract import VectorCodes, VectorEncoder, data_shape, read_data

if TYPE_CHECKING:
    from quire.data import DataModule


class PCAEncoder(VectorEncoder):
    """The first principal components of the training data, fitted once when training starts, then fixed.

    Args:
        width: Components kept.

    Returns:
        VectorCodes of that width: centred data times the components, largest variance first. A component's
        entry of largest magnitude is positive, so two fits agree.

    Raises:
        ConfigError: ``width`` above the data's size or its samples, or use before it is fitted.
    """

    fields = ("image|vector",)
    mean: Tensor
    components: Tensor
    fitted: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        if width < 1:
            raise ConfigError(f"PCAEncoder.width must be positive, got {width}")
        self.width = width
        self._ready = False

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Classify digits by ten components."""
        return {
            "model": {"encoder": {"class_path": "PCAEncoder", "init_args": {"width": 10}}, "objective": "Classify"},
            "data": "Digits",
        }

    def build(self, spec: Spec) -> None:
        """Make room for the fit; it is part of the checkpoint."""
        self.shape = data_shape(spec, self)
        size = math.prod(self.shape)
        if self.width > size:
            raise ConfigError(f"PCAEncoder.width is {self.width}, but the data has {size} numbers a sample: lower it")
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("components", torch.zeros(self.width, size))
        self.register_buffer("fitted", torch.tensor(False))

    def callbacks(self) -> list[Callback]:
        """One that fits it when training starts."""
        return [_FitAtStart(self)]

    @torch.no_grad()
    def fit(self, batches: Iterable[Batch]) -> None:
        """Fit on all of ``batches``: exact, in double precision; memory grows with the square of the data's size."""
        count, total, products = 0, torch.zeros(1, dtype=torch.double), torch.zeros(1, dtype=torch.double)
        for batch in batches:
            rows = read_data(batch, self.shape, self).flatten(1).double().cpu()
            count, total, products = count + len(rows), total + rows.sum(0), products + rows.T @ rows
        if self.width > count:
            raise ConfigError(f"PCAEncoder.width is {self.width}, but there are {count} training samples: lower it")
        mean = total / count
        _, vectors = torch.linalg.eigh(products / count - mean[:, None] * mean)
        components = vectors.flip(1)[:, : self.width].T
        peak = components.gather(1, components.abs().argmax(1, keepdim=True))
        self.mean.copy_(mean)
        self.components.copy_(components * peak.sign())
        self.fitted.fill_(True)

    def forward(self, batch: Batch) -> VectorCodes:
        """Image [B,C,H,W] or vector [B,D] → [B,width]."""
        self._need_fit()
        return VectorCodes((read_data(batch, self.shape, self).flatten(1) - self.mean) @ self.components.T)

    def inverse(self, vector: Tensor) -> Tensor:
        """The data nearest to the mean that has this code: [B,width] → [B,C,H,W] or [B,D]."""
        self._need_fit()
        return (self.mean + vector @ self.components).unflatten(1, self.shape)

    def _need_fit(self) -> None:
        if not self._ready:  # asked once: reading a buffer waits for the GPU
            self._ready = bool(self.fitted)
            if not self._ready:
                raise ConfigError("PCAEncoder was never fitted: run fit or load a checkpoint")


class _FitAtStart(Callback):
    """Fits a PCAEncoder on the whole training split, on every rank alike, unless a checkpoint brought the fit."""

    def __init__(self, encoder: PCAEncoder) -> None:
        self.encoder = encoder

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if bool(self.encoder.fitted):
            return
        source: DataModule | None = trainer.datamodule  # type: ignore[attr-defined]
        if source is None:
            raise ConfigError("PCAEncoder fits on the training split of a data module: give data as one")
        self.encoder.fit(_training(source))


def _training(source: DataModule) -> Iterable[Batch]:
    """The training split once, in order, with the transforms of evaluation; the global random stream is left alone."""
    apart = torch.Generator().manual_seed(source.seed)

    def collate(samples: Any) -> Batch:
        return samples if isinstance(samples, dict) else source.collate(samples)

    for batch in DataLoader(source.dataset("train"), 1024, collate_fn=collate, generator=apart):
        yield source.transform(batch, apart, training=False)
