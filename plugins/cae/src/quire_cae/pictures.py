"""A picture at the end of fit: what the decoder puts where the mask was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.contracts import Batch
from quire.roles.pictures import EndPictures
from quire.roles.tokens.contract import Segment, TokenEncoder
from quire.roles.tokens.patches import patchify, unpatchify
from quire_cae.decoder import MaskedTokenDecoder
from quire_cae.examples import tiny_run
from quire_cae.objective import ContextAutoencoding

COLUMNS = ("image", "what the encoder saw", "predicted tokens", "true tokens")


class CompletedImages(EndPictures):
    """Draw images, their visible patches, and the masked ones as predicted and as they are in tokens. Chen et al. 2022.

    ``ContextAutoencoding`` brings one along where its target can be painted (``KMeansPatches``); list it to change its
    arguments. At the end of fit it writes ``completed.png`` beside the run's log and says where.

    Args:
        images: Number of images, the first of the validation split (of a training batch when there is none).
        file: Name of the PNG.
        seed: Of the masks; the run's own randomness isn't touched.

    Needs:
        objective: ContextAutoencoding.

    Raises:
        ConfigError: ``images`` below 1, or another objective.
    """

    objective: ContextAutoencoding

    def __init__(self, images: int = 6, file: str = "completed.png", seed: int = 0) -> None:
        super().__init__(images, file, seed)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A context autoencoder on digits with two pictures."""
        callback = {"class_path": "CompletedImages", "init_args": {"images": 2}}
        return {**tiny_run(), "trainer": {"callbacks": [callback]}}

    def draw(self, model: Any, batch: Batch, folder: Path) -> dict[Path, str]:
        """Mask, predict, paint, draw."""
        image, segment, objective = batch.get("image"), _grid(model), model.find(ContextAutoencoding)
        if image is None or segment is None or not hasattr(objective.target, "paint"):
            return {}
        columns, right = self.complete(model, objective, image, segment)
        path, said = folder / self.file, f"{100 * right:.0f} % of the masked tokens are right"
        draw(path, said, columns)
        return {path: said}

    def complete(
        self, model: Any, objective: ContextAutoencoding, image: Tensor, segment: Segment
    ) -> tuple[list[Tensor], float]:
        """The four columns [B,C,H,W], and the share of masked tokens that are right."""
        encoder, decoder = model.encoder.role(TokenEncoder), model.decoder.role(MaskedTokenDecoder)
        batch = {"image": image}
        subset = objective.draw(model, batch, self.generator(image.device))
        visible = encoder(batch, keep=subset)
        logits = decoder(objective.regressor(visible, subset.rest), subset.rest, visible.layout)
        target: Any = objective.target
        guessed, true = logits.argmax(-1), target(batch, visible.layout).gather(1, subset.rest)
        patch = (segment.patch[0], segment.patch[1])
        cells = patchify(image, patch)
        place = subset.rest[..., None].expand(-1, -1, cells.shape[-1])

        def filled(patches: Tensor) -> Tensor:
            whole = cells.scatter(1, place, patches.to(cells.dtype))
            return unpatchify(whole, (segment.grid[0], segment.grid[1]), patch)

        grey = torch.full_like(place, 0, dtype=cells.dtype) + 0.5
        columns = [image, filled(grey), filled(target.paint(guessed)), filled(target.paint(true))]
        return columns, (guessed == true).float().mean().item()


def _grid(model: Any) -> Segment | None:
    segments = model.encoder.role(TokenEncoder).built_layout.segments
    one = len(segments) == 1 and segments[0].field == "image" and len(segments[0].grid) == 2
    return segments[0] if one else None


def draw(file: Path, title: str, columns: list[Tensor]) -> None:
    """Columns of images [B,C,H,W] in [0,1], a row a sample, as one PNG."""
    from matplotlib.figure import Figure

    rows, shape = len(columns[0]), columns[0].shape[-2:]
    tall = min(2.0, 1.5 * shape[0] / shape[1])
    figure = Figure(figsize=(1.5 * len(columns), tall * rows + 0.6), layout="constrained")
    for k, pictures in enumerate(columns):
        for i, picture in enumerate(pictures.detach().float().cpu().clamp(0, 1)):
            axes = figure.add_subplot(rows, len(columns), i * len(columns) + k + 1)
            shown = picture.permute(1, 2, 0) if len(picture) == 3 else picture.mean(0)
            axes.imshow(shown.numpy(), "gray", vmin=0, vmax=1, interpolation="nearest")
            axes.axis("off")
            if not i:
                axes.set_title(COLUMNS[k], fontsize=7)
    figure.suptitle(title, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(str(file), dpi=140)
