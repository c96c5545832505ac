"""Beside the training loop: positions for fine-tuning, and pictures of shuffled images put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from torch import Tensor

from quire.contracts import Batch
from quire.errors import ConfigError
from quire.matching import refusal
from quire.roles.pictures import EndPictures
from quire.roles.tokens.contract import Segment, TokenEncoder
from quire_mp3.jigsaw import draw, one_to_one, rearrange
from quire_mp3.modules import TINY
from quire_mp3.objective import PositionPrediction


class AttachPositions(Callback):
    """Give a pretrained encoder without positions new ones, for fine-tuning. Zhai et al. 2022.

    It acts once, when a run starts; the run's checkpoints then hold an encoder that has them. A learned table that
    starts at zero changes no output until it has learned something.

    Args:
        kind: ``learned``, a table [N,D], or ``sincos``, which is fixed.
        init: Start of a learned table: ``zeros`` or ``normal``.
        std: Standard deviation of ``normal``.

    Needs:
        encoder: TokenEncoder.

    Raises:
        ConfigError: an encoder with other positions or that can't have any, a frozen one (its table would never
            learn), or PositionPrediction as the objective, which asks for the positions.
    """

    encoder: TokenEncoder

    def __init__(
        self,
        kind: Literal["learned", "sincos"] = "learned",
        init: Literal["zeros", "normal"] = "zeros",
        std: float = 0.02,
    ) -> None:
        super().__init__()
        if std < 0:
            raise ConfigError(f"AttachPositions.std must be at least 0, got {std:g}")
        self.kind, self.init, self.std = kind, init, std

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Classify digits with an encoder that gets positions when the run starts."""
        return {
            "model": {"encoder": TINY["encoder"], "objective": "Classify"},
            "data": "Digits",
            "trainer": {"callbacks": [{"class_path": "AttachPositions"}]},
        }

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Attach them, before the optimizer is made and a checkpoint is read."""
        said = refusal(type(self), "encoder", pl_module.encoder)  # type: ignore[arg-type]
        if said:
            raise ConfigError(said)
        if pl_module.find(PositionPrediction) is not None:
            raise ConfigError("AttachPositions gives the encoder the positions that PositionPrediction asks it for")
        encoder = pl_module.encoder.role(TokenEncoder)
        if encoder.frozen and self.kind == "learned":
            raise ConfigError("AttachPositions makes a table that a frozen encoder never learns; set freeze: false")
        encoder.attach_positions(self.kind, self.init, self.std)


class PutBackPictures(EndPictures):
    """Draw images, their patches shuffled, and the patches put back where MP3 thinks they were. Zhai et al. 2022.

    ``PositionPrediction`` brings one along; list it to change its arguments.
    The encoder gets the shuffled image, with a context drawn as in training. Every cell is used once: the likeliest
    one-to-one assignment. At the end of fit it writes ``put_back.png`` beside the run's log and says where; runs
    on other data than images draw nothing.

    Args:
        images: Number of images, the first of the validation split (of a training batch when there is none).
        file: Name of the PNG.
        seed: Of the shuffles and contexts; the run's own randomness isn't touched.

    Needs:
        objective: PositionPrediction.

    Raises:
        ConfigError: ``images`` below 1, or another objective.
    """

    objective: PositionPrediction

    def __init__(self, images: int = 6, file: str = "put_back.png", seed: int = 0) -> None:
        super().__init__(images, file, seed)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Position prediction on digits with two pictures."""
        callback = {"class_path": "PutBackPictures", "init_args": {"images": 2}}
        return {"model": TINY, "data": "Digits", "trainer": {"callbacks": [callback]}}

    def draw(self, model: Any, batch: Batch, folder: Path) -> dict[Path, str]:
        """Shuffle, guess, put back, draw."""
        image = batch.get("image")
        segment = _picture(model, image)
        if image is None or segment is None:
            return {}
        shuffles = self.generator("cpu")
        order = torch.stack([torch.randperm(segment.cells, generator=shuffles) for _ in image])
        shuffled = rearrange(image, order.to(image.device), segment)
        guesses = model.find(PositionPrediction).guess(model, {"image": shuffled}, self.generator(image.device))
        token = one_to_one(guesses.logits)  # cell → token of the shuffled image
        back = rearrange(shuffled, token.to(image.device), segment)
        at_home = order.gather(1, token) == torch.arange(segment.cells)
        notes = [f"put back, {n} of {segment.cells} in place" for n in at_home.sum(1).tolist()]
        share, chance = 100 * at_home.float().mean().item(), 100 / segment.cells
        said = f"{share:.0f} % of the shuffled patches are back in their own place (chance {chance:.1f} %)"
        path = folder / self.file
        draw(path, f"{said}; equal patches may have swapped", image, shuffled, back, notes)
        return {path: said}


def _picture(model: Any, image: Tensor | None) -> Segment | None:
    """The one grid of image patches that the encoder cuts; None for any other layout."""
    layout = model.encoder.role(TokenEncoder).built_layout
    segment = layout.segments[0]
    if image is None or len(layout.segments) != 1 or segment.field != "image" or len(segment.grid) != 2:
        return None
    return segment if list(image.shape[2:]) == [g * p for g, p in zip(segment.grid, segment.patch)] else None
