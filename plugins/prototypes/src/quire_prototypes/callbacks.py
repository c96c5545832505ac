"""Beside the training loop: pictures of the prototypes, a start from training data, and pushing (not in the paper)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn

from quire.data import expand
from quire.errors import ConfigError
from quire.matching import refusal
from quire.plugins import load
from quire.roles.latent import PixelDecoder
from quire_prototypes.modules import AUTOENCODER, PrototypeLayer, codes_of, layer_of
from quire_prototypes.pictures import draw_explanations, draw_prototypes
from quire_prototypes.start import starting_codes
from quire_prototypes.training import evaluating, need_source, scan, source_of, take


def _check_role(callback: Callback, model: Any) -> PrototypeLayer:
    said = refusal(type(callback), "decoder", model.decoder)  # type: ignore[arg-type]
    if said:
        raise ConfigError(said)
    return layer_of(model)


class PrototypeImages(Callback):
    """Draw every prototype decoded, the class it votes for and its nearest training image. Li et al. 2018.

    ``PrototypeLayer`` brings one by itself; list it to change its arguments. Files are PNG:
    ``prototypes-0010.png`` after epoch 10, and ``explanations.png`` at the end of fit, test and predict: test images,
    their reconstruction, and their nearest prototypes with distance, weight and contribution. Loggers that take
    pictures (TensorBoard, W&B) get the prototypes too.

    Args:
        every: Epochs between two pictures; the end of fit always draws one.
        path: Folder; null is ``prototypes`` beside the run's log.
        examples: Test images explained.

    Needs:
        decoder: PrototypeLayer with a PixelDecoder inside.

    Raises:
        ConfigError: ``every`` or ``examples`` below 1, or prototypes that can't be decoded to pixels.
    """

    decoder: PrototypeLayer

    def __init__(self, every: int = 10, path: str | None = None, examples: int = 6) -> None:
        if every < 1 or examples < 1:
            raise ConfigError(f"PrototypeImages needs every >= 1 and examples >= 1, got {every} and {examples}")
        self.every, self.path, self.examples = every, path, examples

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Pictures of digits after every epoch."""
        drawing = {"class_path": "PrototypeImages", "init_args": {"every": 1}}
        return {
            "model": {**AUTOENCODER, "objective": "CaseBasedReasoning"},
            "data": "Digits",
            "trainer": {"callbacks": [drawing]},
        }

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what can't be drawn."""
        layer = _check_role(self, pl_module)
        if layer.role(PixelDecoder) is None:
            have = "is not set" if layer.decoder is None else f"is {type(layer.decoder).__name__}"
            installed = ", ".join(load().registry.providing("PixelDecoder"))
            raise ConfigError(
                f"PrototypeImages needs a PixelDecoder; model.decoder.decoder {have}. "
                f"PixelDecoders installed: {installed}"
            )

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Every few epochs."""
        done = trainer.current_epoch + 1
        if done % self.every == 0 and done != trainer.max_epochs:
            self._prototypes(trainer, pl_module, done)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """The final prototypes, and test images explained."""
        self._prototypes(trainer, pl_module, trainer.current_epoch)
        self._explanations(trainer, pl_module)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Test images explained."""
        self._explanations(trainer, pl_module)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Test images explained."""
        self._explanations(trainer, pl_module)

    def _folder(self, trainer: Any, model: Any) -> Path | None:
        """Where this process draws to; None when it doesn't."""
        log = trainer.log_dir  # asked on every rank: Lightning broadcasts it
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return None
        if source_of(model) is None:
            rank_zero_warn("PrototypeImages draws nothing: it needs the training split of a data module")
            return None
        return expand(self.path) if self.path else Path(log or trainer.default_root_dir) / "prototypes"

    @torch.no_grad()
    def _prototypes(self, trainer: Any, model: Any, epoch: int) -> None:
        folder = self._folder(trainer, model)
        if folder is None:
            return
        layer, source = layer_of(model), need_source(model, self)
        found = scan(model, source)
        with evaluating(model):
            drawn = layer.pictures()
            near = take(model, source, "train", found.nearest.tolist())
        file = folder / f"prototypes-{epoch:04d}.png"
        pixels = draw_prototypes(file, drawn, layer, found, near.get("image"))
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("prototypes", images=[pixels], step=trainer.global_step)
            elif hasattr(getattr(logger, "experiment", None), "add_image"):
                logger.experiment.add_image("prototypes", pixels, trainer.global_step, dataformats="HWC")

    @torch.no_grad()
    def _explanations(self, trainer: Any, model: Any) -> None:
        folder = self._folder(trainer, model)
        if folder is None:
            return
        layer, source = layer_of(model), need_source(model, self)
        count = min(self.examples, len(source.dataset("test")))  # type: ignore[arg-type]
        with evaluating(model):
            batch = take(model, source, "test", list(range(count)))
            if "image" not in batch:
                return
            codes = codes_of(model, batch)
            why, again, drawn = layer.explain(codes), layer.reconstruct(codes), layer.pictures()
        draw_explanations(folder / "explanations.png", batch, again, why, drawn)


class PushPrototypes(Callback):
    """Move each prototype onto the nearest training code, so that it is a real case. Not in the paper.

    ProtoPNet's step (Chen et al. 2019, "This Looks Like That") on Li et al. 2018's layer. Right after it R1 over all
    training data is 0; training then moves the prototypes on, except after the last epoch if that pushes.

    Args:
        every: Epochs between two pushes.
        start: Epoch of the first, counted from 1.

    Needs:
        decoder: PrototypeLayer.

    Raises:
        ConfigError: ``every`` or ``start`` below 1, or no data module.
    """

    decoder: PrototypeLayer

    def __init__(self, every: int = 10, start: int = 10) -> None:
        if every < 1 or start < 1:
            raise ConfigError(f"PushPrototypes needs every >= 1 and start >= 1, got {every} and {start}")
        self.every, self.start = every, start

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Pushed after every epoch."""
        push = {"class_path": "PushPrototypes", "init_args": {"every": 1, "start": 1}}
        return {
            "model": {**AUTOENCODER, "objective": "CaseBasedReasoning"},
            "data": "Digits",
            "trainer": {"callbacks": [push]},
        }

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a model without prototypes."""
        _check_role(self, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Push, on every rank alike."""
        done = trainer.current_epoch + 1
        if done >= self.start and (done - self.start) % self.every == 0:
            push(pl_module, need_source(pl_module, self))


@torch.no_grad()
def push(model: Any, source: Any) -> None:
    """Each prototype becomes the code of its nearest training sample."""
    layer_of(model).prototypes.copy_(scan(model, source).codes)


class StartPrototypes(Callback):
    """Start a layer on training data, once, when its ``init`` asks for it. ``PrototypeLayer`` brings it by itself.

    Args:
        layer: The layer to start.
    """

    def __init__(self, layer: PrototypeLayer) -> None:
        self.layer = layer

    @torch.no_grad()
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """On every rank alike; a checkpoint's prototypes are kept."""
        if not bool(self.layer.started):
            self.layer.prototypes.copy_(starting_codes(pl_module, self.layer, self))
            self.layer.started.fill_(True)
