"""What ``lightning fit`` costs a step over a loop written by hand with the same modules."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from tests.benchmarks.clock import Beside, milliseconds, more_milliseconds, one_thread, ratio, table

from quire import DataModule, Model
from quire.recipe import instantiate

PLACES = {
    "encoder": {
        "class_path": "ViTEncoder",
        "init_args": {"patch": 4, "width": 192, "depth": 6, "heads": 3, "positions": "none"},
    },
    "objective": {"class_path": "PositionPrediction", "init_args": {"masking": 0.75, "pictures": 0}},
}
CODES = {
    "encoder": {"class_path": "MlpVectorEncoder", "init_args": {"widths": [16], "code": 4}},
    "decoder": {"class_path": "MlpVectorDecoder", "init_args": {"widths": [16]}},
    "objective": {
        "class_path": "Sum",
        "init_args": {"objectives": [{"class_path": "Reconstruction"}, {"class_path": "Classify"}]},
    },
}


def digits(size: int, batch_size: int) -> DataModule:
    """scikit-learn's digits, resized."""
    from quire.datasets.images import Digits

    return Digits(size=size, batch_size=batch_size)


def model_of(parts: dict[str, Any], data: DataModule) -> Model:
    """A model from short names, with its sizes from the data."""
    from quire.plugins import load

    load().registry.import_named(str(parts).replace("'", " ").split())
    torch.manual_seed(0)
    return Model(**{name: instantiate(part) for name, part in parts.items()}, spec=data.spec)


def by_hand(model: Model, data: DataModule) -> Callable[[], float]:
    """A function that runs one step of a plain PyTorch loop over ``model``'s own modules."""
    model.configure_model()
    model.train()
    weights = model.objective.weights
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    def batches() -> Iterator[Any]:
        loader = data.train_dataloader()
        while True:
            yield from loader

    feed = batches()

    def step() -> float:
        batch = next(feed)
        optimizer.zero_grad()
        losses = model.objective(model, batch)
        loss = sum(weights.get(name, 1.0) * term for name, term in losses.items())
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.item()

    return step


class Bare(pl.LightningModule):
    """The least LightningModule: no logging, unless ``logs``, which calls ``log_dict`` with two values."""

    def __init__(self, model: Model, logs: bool = False) -> None:
        super().__init__()
        self.inside, self.logs = model, logs
        model.configure_model()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        losses = self.inside.objective(self.inside, batch)
        loss = sum(self.inside.objective.weights.get(k, 1.0) * v for k, v in losses.items())
        if self.logs:
            self.log_dict({"a": loss, "b": loss})
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fitted(module: pl.LightningModule, data: DataModule, other: Callable[[], float], steps: int, every: int) -> Beside:
    """Fit with a CSV log, and ``other``'s steps between its own."""
    beside = Beside(other)
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = pl.Trainer(
            max_steps=steps + 3,
            accelerator="cpu",
            logger=pl.loggers.CSVLogger(folder),
            callbacks=[beside],
            log_every_n_steps=every,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            limit_val_batches=0,
        )
        trainer.fit(module, datamodule=data)
    return beside


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Lightning's remarks kept back."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def compare(parts: dict[str, Any], size: int, batch_size: int, steps: int) -> list[list[str]]:
    """Rows of arms: CPU-ms a step beside the hand loop's in the same run."""
    arms: dict[str, tuple[Callable[[DataModule], pl.LightningModule], int]] = {
        "quire, logged every 50 steps": (lambda data: model_of(parts, data), 50),
        "quire, logged every step": (lambda data: model_of(parts, data), 1),
        "bare Lightning, no log": (lambda data: Bare(model_of(parts, data)), 50),
        "bare Lightning, log_dict of 2": (lambda data: Bare(model_of(parts, data), logs=True), 50),
    }
    rows = [["", "fit, ms a step", "by hand, ms", "fit / hand", "fit - hand, ms"]]
    for name, (make, every) in arms.items():
        hand = by_hand(model_of(parts, digits(size, batch_size)), digits(size, batch_size))
        data = digits(size, batch_size)
        spent = fitted(make(data), data, hand, steps, every).spent
        fit, other = spent["fit"], spent["other"]
        rows.append([name, milliseconds(fit), milliseconds(other), ratio(fit, other), more_milliseconds(fit, other)])
    return rows


def main() -> None:
    """Print both tables: a ViT where the model is what costs, and a tiny model where the loop is."""
    with one_thread():
        rows = compare(CODES, 8, 32, steps=200)
        table("Loop, tiny model (aim: quire at most 5 ms over the hand loop); median (minimum)", rows)
        from quire.plugins import load

        if "mp3" not in load().records:
            print("\nLoop, MP3: plugin mp3 is not installed")
            return
        rows = compare(PLACES, 32, 64, steps=int(os.environ.get("BENCH_STEPS", 12)))
        table("Loop, MP3 on a ViT of width 192, depth 6, 64 tokens, batch 64 (aim: fit / hand at most 1.02)", rows)


if __name__ == "__main__":
    sys.exit(main())
