"""Phase 1: keys from data without labels, before the first training step; then they stay. Träuble et al. 2023."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from quire.checkpoint import read
from quire.contracts import Batch
from quire.data import DataModule, expand, mix
from quire.errors import ConfigError
from quire.matching import refusal
from quire.roles.sparse.ranks import sum_over_ranks
from quire_dkvb.encoder import KeyValueBottleneck, tiny_run
from quire_dkvb.modules import Averages, distortion, ema_step, kmeans, nearest
from quire_dkvb.stream import whole

log = logging.getLogger(__name__)

METHODS = ("ema", "kmeans", "uniform")
STRIDE = 0.02
"""Length of a step of ``heads: learned``, of a column of unit length."""


class KeyInit(Callback):
    """Place the keys where data without labels falls, by moving averages; then they stay. Träuble et al. 2023.

    ``KeyValueBottleneck`` brings one along; list it to change its arguments. It runs once, when training starts, on all
    processes together; a checkpoint's keys are kept. Labels are never looked at. ``trainer.limit_train_batches`` limits
    its batches too.

    Args:
        data: Where keys come from; null is the training data. The paper takes another data set.
        epochs: Passes of moving averages; 0 leaves the keys at their start.
        decay: gamma of the averages, in [0, 1).
        method: How keys start: ``ema``: at random, and averages do the rest; ``kmeans`` of the first batch; ``uniform``
            in the range of the first batch's heads (the paper's toy); or ``FILE#TENSOR``: rows of a checkpoint or
            .safetensors file: features [M,D], such as prototypes, or keys [C,M,d].
        dead_factor: A key is replaced by a head vector of the batch below this share of the mean use; 0 never.
        batch_size: Samples a step, of all processes together.

    Needs:
        encoder: KeyValueBottleneck.

    Raises:
        ConfigError: a value out of its range, more keys than samples for ``kmeans``, or no data module.
    """

    encoder: KeyValueBottleneck

    def __init__(
        self,
        data: DataModule | None = None,
        epochs: int = 10,
        decay: float = 0.95,
        method: str = "ema",
        dead_factor: float = 0.1,
        batch_size: int = 256,
    ) -> None:
        if epochs < 0 or batch_size < 1 or dead_factor < 0:
            raise ConfigError(
                f"KeyInit needs epochs >= 0, batch_size >= 1 and dead_factor >= 0, got {epochs}, {batch_size} and "
                f"{dead_factor:g}"
            )
        if not 0 <= decay < 1:
            raise ConfigError(f"KeyInit.decay must be in [0, 1), got {decay:g}")
        if method not in METHODS and "#" not in method:
            raise ConfigError(f"KeyInit.method must be {', '.join(METHODS)} or FILE#TENSOR, got {method!r}")
        self.data, self.epochs, self.decay, self.method = data, epochs, decay, method
        self.dead_factor, self.batch_size = dead_factor, batch_size

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Two passes over digits."""
        given = {"class_path": "KeyInit", "init_args": {"epochs": 2, "batch_size": 64}}
        return {**tiny_run(), "trainer": {"callbacks": [given]}}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a model without a bottleneck."""
        said = refusal(type(self), "encoder", pl_module.encoder)  # type: ignore[arg-type]
        if said:
            raise ConfigError(said)

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        """Before anything is looked up; what fits itself at the start of ``fit`` has done so."""
        self.run(pl_module, trainer.limit_train_batches)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The same where there is no sanity check."""
        self.run(pl_module, trainer.limit_train_batches)

    # ---- phase 1
    @torch.no_grad()
    def run(self, model: Any, limit: int | float = 1.0) -> None:
        """Initialise the keys of ``model``, unless they are."""
        bottleneck = model.find(KeyValueBottleneck)
        if bool(bottleneck.ready):
            return
        source = self.data if self.data is not None else model.datamodule
        if source is None:
            raise ConfigError("KeyInit looks at the training split of a data module: give data as one, or KeyInit.data")
        training = bottleneck.training
        bottleneck.eval()
        generator = torch.Generator().manual_seed(mix(model.seed, 0, 2207))
        steps = Steps(model, bottleneck, source, self.batch_size, limit)
        keys, averages = self._start(bottleneck, steps, generator)
        heads = bottleneck.R.clone() if bottleneck.heads == "learned" else None
        for _ in range(self.epochs):
            for features in steps.features(generator):
                if heads is not None:
                    heads = turned(heads, features, keys)
                    h = (features @ heads.flatten(1)).unflatten(-1, heads.shape[1:])
                else:
                    h = bottleneck.project(features)
                ema_step(keys, averages, h, self.decay, self.dead_factor, generator)
        bottleneck.initialised(keys, heads)
        lost = float(distortion(bottleneck.project(steps.first()), keys))
        log.info("keys: %d passes over %d samples, %.2f of the heads' variance is lost", self.epochs, len(steps), lost)
        bottleneck.train(training)

    def _start(self, bottleneck: Any, steps: Steps, generator: torch.Generator) -> tuple[Tensor, Averages]:
        keys = bottleneck.keys
        books, count, width = keys.shape
        if self.method == "ema":
            drawn = torch.randn(books, count, width, generator=generator)
        elif self.method == "kmeans":
            heads = bottleneck.project(steps.first())
            if len(heads) < count:
                raise ConfigError(
                    f"KeyInit.method kmeans places {count} keys on the {len(heads)} samples of the first batch: lower "
                    "KeyValueBottleneck.keys or raise KeyInit.batch_size"
                )
            drawn = kmeans(heads, count, generator)
        elif self.method == "uniform":
            heads = bottleneck.project(steps.first()).cpu()
            low, high = heads.amin(0)[:, None], heads.amax(0)[:, None]
            drawn = low + (high - low) * torch.rand(books, count, width, generator=generator)
        else:
            drawn = self._from_file(bottleneck).cpu()
        keys = drawn.to(keys)
        mean = 0.0 if self.method == "ema" else self.batch_size / count  # a start that is meant has its weight
        return keys, Averages.start(keys, mean)

    def _from_file(self, bottleneck: Any) -> Tensor:
        path, _, name = self.method.rpartition("#")
        file = expand(path)
        try:
            weights = load_file(str(file)) if file.suffix == ".safetensors" else read(file)["state_dict"]
        except (SafetensorError, FileNotFoundError) as error:
            raise ConfigError(f"KeyInit.method: there is no safetensors file {file}, or it is truncated") from error
        if name not in weights:
            near = ", ".join(sorted(k for k, v in weights.items() if v.ndim > 1)[:8])
            raise ConfigError(f"KeyInit.method: {file} has no tensor {name}; it has {near}")
        rows = weights[name].float()
        if rows.shape == bottleneck.keys.shape:
            return rows
        count, width = bottleneck.count, bottleneck.feature_width
        if rows.shape != (count, width):
            raise ConfigError(
                f"KeyInit.method: {name} is {list(rows.shape)}; features must be [keys, {width}] with keys = {count}, "
                f"or keys {list(bottleneck.keys.shape)}"
            )
        return bottleneck.project(rows.to(bottleneck.keys.device)).transpose(0, 1)


def turned(heads: Tensor, features: Tensor, keys: Tensor) -> Tensor:
    """R [D,C,d] one step towards less quantisation error over variance; ours, the paper doesn't say how it learns.

    Both are those of all processes.
    """
    with torch.enable_grad():
        moving = heads.clone().requires_grad_()
        h = (features @ moving.flatten(1)).unflatten(-1, moving.shape[1:])
        chosen = nearest(h, keys)[..., 0]
        mean = sum_over_ranks(h.sum(0)) / sum_over_ranks(h.new_tensor(float(len(h))))
        error = (h - keys[torch.arange(keys.shape[0], device=keys.device), chosen]).square().sum()
        spread = (h - mean).square().sum()
        whole_error, whole_spread = sum_over_ranks(error), sum_over_ranks(spread).clamp(min=1e-12)
        loss = error / whole_spread - whole_error / whole_spread.square() * spread
        (slope,) = torch.autograd.grad(loss, moving)
    return normalize(heads - STRIDE * normalize(sum_over_ranks(slope), dim=0), dim=0)


class Steps:
    """Features of a training split, step by step, each process its share of a step.

    Args:
        model: Whose device and seed count.
        bottleneck: Whose frozen encoder reads.
        source: The data.
        size: Samples a step, of all processes.
        limit: Most steps of a pass, or a share of them.
    """

    def __init__(
        self, model: Any, bottleneck: KeyValueBottleneck, source: DataModule, size: int, limit: int | float
    ) -> None:
        self.model, self.bottleneck, self.source, self.size = model, bottleneck, source, size
        self.data: Any = whole(source, "train")
        steps = -(-len(self) // size)
        self.limit = limit if isinstance(limit, int) else max(1, int(steps * limit))

    def __len__(self) -> int:
        return len(self.data)

    def features(self, generator: torch.Generator) -> Iterator[Tensor]:
        """One pass in an order that all processes share, [n,D] each: real tokens only."""
        trainer = self.model._trainer
        world, rank = (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)
        order = torch.randperm(len(self.data), generator=generator)
        for places in order.split(self.size)[: self.limit]:
            if len(places) >= world:
                yield self._read(places.tensor_split(world)[rank])

    def first(self) -> Tensor:
        """The first step's features of all processes, the same on each."""
        return self._read(torch.randperm(len(self.data), generator=torch.Generator().manual_seed(0))[: self.size])

    def _read(self, places: Tensor) -> Tensor:
        batch = take(self.model, self.source, self.data, places.tolist())
        features, mask = self.bottleneck.read(batch)
        return features.flatten(0, 1).float() if mask is None else features[mask].float()


def take(model: Any, source: DataModule, data: Any, places: list[int]) -> Batch:
    """Samples on the model's device, with the transforms of evaluation; no random stream of the run moves."""
    fetch = getattr(data, "__getitems__", None)
    batch = fetch(places) if fetch else [data[i] for i in places]
    batch = batch if isinstance(batch, dict) else source.collate(batch)
    batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return source.transform(batch, torch.Generator(model.device).manual_seed(source.seed), training=False)
