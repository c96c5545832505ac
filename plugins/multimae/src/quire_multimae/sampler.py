"""CrossModal: predict every modality from those that are shown. Bachmann et al. 2022."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quire.contracts import Batch, Sampler
from quire.errors import ConfigError
from quire.roles.tokens.contract import Layout, Subset
from quire_multimae.adapters import tiny_run
from quire_multimae.decoder import MultiTaskDecoder
from quire_multimae.encoder import MultiModalViT

if TYPE_CHECKING:
    from quire.model import Model

Share = str | float


class CrossModal(Sampler):
    """Show some modalities and predict all tasks: depth from an image, an image from its edges. Bachmann et al. 2022.

    Args:
        visible: Modality → ``all``, ``none`` or the share of its tokens that is shown, in [0, 1]; modalities not
            named are not shown. Null shows the encoder's first one. What isn't shown may be missing in the batch.

    Needs:
        encoder: MultiModalViT. decoder: MultiTaskDecoder.

    Returns:
        Predictions by task in the field's own form: numbers [B,C,H,W] in its unit, class ids [B,h,w].

    Raises:
        ConfigError: a word or share that isn't possible, an unknown modality, or nothing shown.
    """

    encoder: MultiModalViT
    decoder: MultiTaskDecoder

    def __init__(self, visible: dict[str, str | float] | None = None) -> None:
        super().__init__()
        for name, share in (visible or {}).items():
            if share not in ("all", "none") and (isinstance(share, str) or not 0 <= share <= 1):
                raise ConfigError(f"visible.{name} must be all, none or a share in [0,1], got {share!r}")
        self.visible = visible

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Predict digits and their levels from edges."""
        run = tiny_run()
        run["model"]["sampler"] = {"class_path": "CrossModal", "init_args": {"visible": {"edges": "all"}}}
        return run

    def check(self, model: Model) -> None:
        """Refuse an unknown modality, and nothing shown."""
        self._shares(list(model.encoder.role(MultiModalViT).adapters))

    def _shares(self, names: list[str]) -> dict[str, float]:
        if self.visible is None:
            return {names[0]: 1.0}
        for name in self.visible:
            if name not in names:
                raise ConfigError(f"visible names {name!r}; the encoder has {', '.join(names)}")
        told = {name: self.visible.get(name, "none") for name in names}
        shares = {k: 1.0 if v == "all" else 0.0 if v == "none" else float(v) for k, v in told.items()}
        shown = {k: v for k, v in shares.items() if v > 0}
        if not shown:
            raise ConfigError(f"CrossModal.visible shows nothing: give at least one of {', '.join(names)}")
        return shown

    def reads(self, stage: str) -> tuple[str, ...]:
        """The fields of the modalities that are shown (by name: those of null are the encoder's own)."""
        return ()

    def forward(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Every task's prediction."""
        encoder, decoder = model.encoder.role(MultiModalViT), model.decoder.role(MultiTaskDecoder)
        codes = self.codes(model, batch)
        found = decoder(codes)
        pictures = {}
        for task, predicted in found.items():
            grid = decoder.segment(task, encoder.layout(batch)).grid
            if len(predicted[0]) != grid[0] * grid[1]:  # the batch is of another size than what is shown
                grid = decoder.segment(task, codes.layout).grid
            pictures[task] = decoder.outputs[task].picture(predicted.float(), grid)
        return pictures

    def codes(self, model: Model, batch: Batch) -> Any:
        """What the encoder sees: only shown modalities are embedded at all."""
        encoder = model.encoder.role(MultiModalViT)
        adapters = encoder.adapters
        shares = self._shares(list(adapters))
        missing = [adapters[name].field for name in shares if adapters[name].field not in batch]
        if missing:
            raise ConfigError(f"CrossModal shows {missing[0]}, which the batch lacks; it has {', '.join(batch)}")
        shown = {adapters[name].field: batch[adapters[name].field] for name in shares}
        if all(share == 1.0 for share in shares.values()):
            return encoder(shown)
        layout: Layout = encoder.layout(shown)
        lead = next(iter(shown.values()))
        parts = []
        for segment in layout.segments:
            noise = torch.rand(len(lead), segment.cells, generator=model.generator(lead.device), device=lead.device)
            count = max(1, round(shares[segment.name] * segment.cells))
            parts.append(segment.start + noise.argsort(1)[:, :count].sort(1).values)
        keep = torch.cat(parts, 1)
        return encoder(shown, keep=Subset.of(keep, layout.cells, check=False))
