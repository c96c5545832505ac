"""Pictures of every modality: what was seen, what was predicted, what was there. After Bachmann et al. 2022."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.contracts import Batch
from quire.errors import ConfigError
from quire.roles.pictures import EndPictures
from quire.roles.tokens.contract import Segment, Subset
from quire_multimae.adapters import tiny_run
from quire_multimae.decoder import MultiTaskDecoder
from quire_multimae.encoder import MultiModalViT
from quire_multimae.objective import MaskedMultiTask


class ModalityPictures(EndPictures):
    """Draw masked inputs, predictions and targets of every task, and all from one modality alone. Bachmann et al. 2022.

    ``MaskedMultiTask`` brings one along; list it to change its arguments. At the end of fit it writes two files beside
    the log: ``modalities.png`` (a mask drawn as in training) and ``from_<modality>.png``. It draws nothing for other
    encoders or decoders than MultiMAE's.

    Args:
        images: Samples, the first of the validation split (of a training batch when there is none).
        alone: The modality that is shown alone; null is the last numeric one that isn't the first (depth or edges).
        file: Name of the first PNG.
        seed: Of the masks; the run's own randomness isn't touched.

    Needs:
        objective: MaskedMultiTask.

    Raises:
        ConfigError: ``images`` below 1, another objective, or an unknown modality.
    """

    objective: MaskedMultiTask
    transformed = True

    def __init__(self, images: int = 4, alone: str | None = None, file: str = "modalities.png", seed: int = 0) -> None:
        super().__init__(images, file, seed)
        self.alone = alone

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """MultiMAE on digits with pictures of two samples."""
        callback = {"class_path": "ModalityPictures", "init_args": {"images": 2}}
        return {**tiny_run(), "trainer": {"callbacks": [callback]}}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse another objective and an unknown modality."""
        super().setup(trainer, pl_module, stage)
        encoder = pl_module.encoder.role(MultiModalViT)
        if self.alone is not None and encoder is not None and self.alone not in encoder.adapters:
            raise ConfigError(f"ModalityPictures.alone is {self.alone!r}; there are {', '.join(encoder.adapters)}")

    def draw(self, model: Any, batch: Batch, folder: Path) -> dict[Path, str]:
        """Predict and draw."""
        encoder, decoder = model.encoder.role(MultiModalViT), model.decoder.role(MultiTaskDecoder)
        if encoder is None or decoder is None:
            return {}
        device = next(iter(batch.values())).device
        written = [folder / self.file]
        draw(written[0], "seen, predicted, target", model, batch, self._masked(model, batch, self.generator(device)))
        name = self.alone or default_alone(encoder, batch)
        if name is not None:
            written.append(folder / f"from_{name}.png")
            segment = next(s for s in encoder.layout(batch).segments if s.name == name)
            rows = len(batch[segment.field])
            keep = torch.arange(segment.start, segment.stop, device=device).expand(rows, -1)
            subset = Subset.of(keep, encoder.layout(batch).cells, check=False)
            draw(written[1], f"all predicted from {name} alone", model, batch, subset)
        return {file: "what MultiMAE saw, predicted and should have" for file in written}

    def _masked(self, model: Any, batch: dict[str, Any], generator: torch.Generator) -> Subset:
        layout = model.encoder.role(MultiModalViT).layout(batch)
        rows = len(batch[layout.segments[0].field])
        return model.find(MaskedMultiTask).masking.draw(layout, rows, None, generator)


def default_alone(encoder: MultiModalViT, batch: dict[str, Any]) -> str | None:
    """The last numeric modality after the first one that the batch has; None when there is one only."""
    names = [n for n, a in list(encoder.adapters.items())[1:] if a.field in batch]
    numeric = [n for n in names if not encoder.adapters[n].classes]
    return (numeric or names or [None])[-1]  # type: ignore[list-item]


def draw(file: Path, title: str, model: Any, batch: dict[str, Any], subset: Subset) -> None:
    """A row a sample, three pictures a task: seen, predicted, target.

    Args:
        file: PNG to write; its folder is made.
        title: Above all.
        model: With MultiMAE's encoder and decoder.
        batch: A few samples.
        subset: What the encoder sees.
    """
    from matplotlib.figure import Figure

    encoder, decoder = model.encoder.role(MultiModalViT), model.decoder.role(MultiTaskDecoder)
    layout = encoder.layout(batch)
    predictions = decoder(encoder(batch, keep=subset))
    places = {s.name: s for s in layout.segments}
    tasks = [t for t, a in decoder.outputs.items() if a.field in batch and _absolute(model, t)]
    rows = len(subset.keep)
    figure = Figure(figsize=(1.05 * 3 * len(tasks), 1.2 * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=8)
    axes = figure.subplots(rows, 3 * len(tasks), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for j, task in enumerate(tasks):
        adapter = decoder.outputs[task]
        grid = decoder.segment(task, layout).grid
        made = adapter.picture(predictions[task].float(), grid)
        target, shown = batch[adapter.field], None
        if adapter.name in places:
            shown = _cells(subset.kept(), places[adapter.name])
        for i in range(rows):
            trio = axes[i, 3 * j : 3 * j + 3]
            low, high = float(target[i].float().min()), float(target[i].float().max())
            limits = (0.0, float(adapter.classes - 1)) if adapter.classes else (low, max(high, low + 1e-6))
            show(trio[0], target[i], limits, None if shown is None else shown[i], bool(adapter.classes), "seen")
            show(trio[1], made[i], limits, None, bool(adapter.classes), task)
            show(trio[2], target[i], limits, None, bool(adapter.classes), "target")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(str(file), dpi=130)


def _absolute(model: Any, task: str) -> bool:
    """A patch-normalised prediction has no picture of its own."""
    said = model.find(MaskedMultiTask).tasks.get(task)
    return said is not None and said.target != "patch_norm"


def _cells(kept: Tensor, segment: Segment) -> Tensor:
    """[B,N] → [B,H,W] bool of the segment's field."""
    own = kept[:, segment.start : segment.stop].reshape(len(kept), *segment.grid)
    return own.repeat_interleave(segment.patch[0], 1).repeat_interleave(segment.patch[1], 2)


def show(axis: Any, value: Tensor, limits: tuple[float, float], seen: Tensor | None, ids: bool, title: str) -> None:
    """One picture; what wasn't seen is hatched grey."""
    pixels = value.detach().float().cpu()
    pixels = pixels if pixels.ndim == 3 else pixels[None]
    axis.set_title(title, fontsize=6)
    if len(pixels) == 3:
        axis.imshow(pixels.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    else:
        colours = "tab20" if ids else "gray"
        axis.imshow(pixels.mean(0).numpy(), cmap=colours, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    if seen is not None:
        hidden = torch.zeros(*seen.shape, 4)
        hidden[..., :3], hidden[..., 3] = 0.55, (~seen).float().cpu()
        axis.imshow(hidden.numpy(), interpolation="nearest")
