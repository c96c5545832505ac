"""MaskedMultiTask: see a few tokens of all modalities, predict every modality. Bachmann et al. 2022."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from quire.contracts import Batch, Losses, Objective, Spec
from quire.errors import ConfigError
from quire.roles.masking import Masking
from quire.roles.tokens.contract import CellDecoder, TokenEncoder
from quire.roles.tokens.patches import patchify
from quire_multimae.adapters import ModalityAdapter, tiny_run
from quire_multimae.decoder import MultiTaskDecoder
from quire_multimae.encoder import MultiModalViT
from quire_multimae.masking import DirichletMask
from quire_multimae.outputs import outputs
from quire_multimae.standardize import truncated_standardize

if TYPE_CHECKING:
    from quire.model import Model

LOSSES, TARGETS = ("mse", "l1", "ce"), ("raw", "patch_norm", "standardized")


@dataclass(frozen=True)
class Task:
    """How one task is judged."""

    loss: str | None = None
    weight: float = 1.0
    target: str = "raw"

    @classmethod
    def read(cls, name: str, what: str | dict[str, Any] | None) -> Task:
        """From YAML: a loss, or a mapping. Raises ``ConfigError`` naming what isn't known."""
        given = {"loss": what} if isinstance(what, str) else dict(what or {})
        unknown = sorted(set(given) - {"loss", "weight", "target"})
        if unknown:
            raise ConfigError(f"task {name!r} has {unknown[0]!r}; a task takes loss, weight and target")
        made = cls(**given)
        if made.loss is not None and made.loss not in LOSSES:
            raise ConfigError(f"task {name!r} has loss={made.loss!r}; it takes {', '.join(LOSSES)}")
        if made.target not in TARGETS:
            raise ConfigError(f"task {name!r} has target={made.target!r}; it takes {', '.join(TARGETS)}")
        if made.weight < 0:
            raise ConfigError(f"task {name!r} has weight={made.weight}; it must be at least 0")
        return made

    def fits(self, name: str, adapter: ModalityAdapter) -> Task:
        """With its loss filled in. Raises ``ConfigError`` when the loss or target can't be of this modality."""
        plain = "ce" if adapter.classes else "l1" if adapter.field == "depth" else "mse"
        loss = self.loss or plain
        if (loss == "ce") != bool(adapter.classes):
            kind, fit = ("classes", "ce") if adapter.classes else ("numbers", "mse or l1")
            raise ConfigError(f"task {name!r} has loss={loss}, but {adapter.name} holds {kind}: use {fit}")
        if adapter.classes and self.target != "raw":
            raise ConfigError(f"task {name!r} has target={self.target}, but {adapter.name} holds classes: use raw")
        return Task(loss, self.weight, self.target)


class MaskedMultiTask(Objective):
    """Encode a random few of all modalities' tokens and predict every modality where it was masked.

    Bachmann et al. 2022, arXiv 2204.01678. For each task: the mean over the masked cells' values of each sample, then
    over samples that have masked cells. The sum over tasks is trained.

    Args:
        tasks: Task → its loss (mse, l1 or ce), or ``{loss, weight, target}``. Target ``raw`` is the field as the
            adapter normalises it, ``patch_norm`` each patch standardised (unbiased variance plus 1e-6),
            ``standardized`` the whole map, without its extreme tenths. Null: every task of the decoder, ce for
            classes, l1 for depth, mse for other numbers.
        masking: Which tokens are seen; null is ``DirichletMask``: a sixth of all, shares even on average.
        balance: ``none`` adds the tasks with their weights; ``uncertainty`` learns a log-variance s for each and
            adds exp(-s) loss + s (Kendall et al. 2018).
        loss_on_visible: Whether visible cells count too.
        pictures: Samples in the picture drawn at the end of fit; 0 for none.

    Needs:
        encoder: TokenEncoder that takes a subset. decoder: MultiTaskDecoder, or one [B,N,F] over the whole grid.

    Returns:
        One term a task, in the target's unit (squared for mse), nats for ce.

    Raises:
        ConfigError: a task without a decoder, a loss or target that doesn't fit its modality, a size that differs.
    """

    encoder: TokenEncoder
    decoder: CellDecoder
    requires = {"encoder": frozenset({"subset", "grid"})}

    def __init__(
        self,
        tasks: dict[str, str | dict[str, Any]] | None = None,
        masking: Masking | None = None,
        balance: Literal["none", "uncertainty"] = "none",
        loss_on_visible: bool = False,
        pictures: int = 4,
    ) -> None:
        super().__init__()
        if balance not in ("none", "uncertainty"):
            raise ConfigError(f"MaskedMultiTask.balance must be none or uncertainty, got {balance!r}")
        if pictures < 0:
            raise ConfigError(f"MaskedMultiTask.pictures must be at least 0, got {pictures}")
        self.asked = None if tasks is None else {name: Task.read(name, what) for name, what in tasks.items()}
        self.masking = masking or DirichletMask()
        self.balance, self.loss_on_visible, self.pictures = balance, loss_on_visible, pictures
        self.tasks: dict[str, Task] = {}
        self.outputs: dict[str, ModalityAdapter] = {}
        self._of_decoder: dict[str, Any] | None = None

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """MultiMAE on digits, their edges and their levels."""
        return tiny_run()

    def callbacks(self) -> list[Callback]:
        """The picture at the end of fit."""
        from quire_multimae.pictures import ModalityPictures

        return [ModalityPictures(self.pictures)] if self.pictures else []

    def check(self, model: Model) -> None:
        """Refuse a task that the decoder doesn't have."""
        decoder = model.decoder.role(MultiTaskDecoder)
        encoder = model.encoder.role(MultiModalViT)
        self._of_decoder = None if decoder is None else decoder.tasks
        names = None if self._of_decoder is None else list(self._of_decoder)
        if names is None and encoder is not None:
            names = list(encoder.adapters)
        for task in self.asked or ():
            if names is not None and task not in names:
                raise ConfigError(f"task {task!r} has no decoder; tasks: {', '.join(names)}")

    def build(self, spec: Spec) -> None:
        """Learn what each task predicts; make the log-variances."""
        super().build(spec)
        found = outputs(self._of_decoder, spec, self)
        asked = self.asked if self.asked is not None else {name: Task() for name in found}
        for name in asked:
            if name not in found:
                raise ConfigError(f"task {name!r} has no decoder; tasks: {', '.join(found)}")
        self.outputs = {name: found[name] for name in asked}
        self.tasks = {name: task.fits(name, found[name]) for name, task in asked.items()}
        self.weights = {name: task.weight for name, task in self.tasks.items() if task.weight != 1}
        if self.balance == "uncertainty":
            self.log_variance = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in self.tasks})

    def forward(self, model: Model, batch: Batch) -> Losses:
        """One draw, one pass through the encoder, one through every decoder."""
        encoder = model.encoder
        layout, mask = encoder.layout(batch), encoder.token_mask(batch)
        lead = batch[layout.segments[0].field]
        subset = self.masking.draw(layout, len(lead), mask, model.generator(lead.device))
        codes = encoder(batch, keep=subset)
        decoder = model.decoder.role(MultiTaskDecoder)
        made = model.decoder(codes) if decoder is None else decoder(codes, subset, mask, list(self.tasks))
        predictions = made if isinstance(made, dict) else self._cut(made, layout)
        masked = {s.name: ~subset.kept()[:, s.start : s.stop] for s in layout.segments}
        if mask is not None:
            masked = {s.name: masked[s.name] & mask[:, s.start : s.stop] for s in layout.segments}
        terms, plain = {}, {}
        for name in self.tasks:
            chosen = None if self.loss_on_visible else masked.get(self.outputs[name].name)
            value, judged = self.loss(name, predictions[name].float(), batch, chosen)
            if self.balance == "uncertainty":
                log = self.log_variance[name]
                plain[f"{name}_plain"] = value.detach()
                value = (-log).exp() * value + log * judged
            terms[name] = value
        seen = {"codes": codes, "predictions": predictions, "subset": subset}
        return Losses(terms, plain, seen)

    def _cut(self, made: Tensor, layout: Any) -> dict[str, Tensor]:
        """A decoder over the whole grid: each task takes its modality's cells."""
        segments = {s.name: s for s in layout.segments}
        found = {}
        for name, adapter in self.outputs.items():
            if adapter.values != made.shape[-1]:
                raise ConfigError(
                    f"task {name!r} needs {adapter.values} values a cell, the decoder gives {made.shape[-1]}: "
                    "use MultiTaskDecoder for modalities whose patches differ"
                )
            if adapter.name not in segments:  # absent from this batch: nothing to predict, but keep the gradient
                found[name] = made
                continue
            found[name] = made[:, segments[adapter.name].start : segments[adapter.name].stop]
        return found

    def loss(self, name: str, predicted: Tensor, batch: Batch, masked: Tensor | None) -> tuple[Tensor, float]:
        """One task's loss.

        Args:
            name: The task.
            predicted: [B,N,values].
            batch: Holds the target; a batch without it gives 0.
            masked: [B,N] bool, True = counts; None for all cells.

        Returns:
            A scalar with a gradient, and 1.0, or 0.0 where the batch has no target.

        Raises:
            ConfigError: a target with another number of cells.
        """
        task, adapter = self.tasks[name], self.outputs[name]
        if adapter.field not in batch:
            return predicted.sum() * 0, 0.0  # still part of the graph: data-parallel training waits for it
        target, counts = _target(task, adapter, batch)
        if target.shape[1] != predicted.shape[1]:
            raise ConfigError(
                f"task {name!r} predicts {predicted.shape[1]} cells, the batch's {adapter.field} has {target.shape[1]}"
            )
        if task.loss == "ce":
            logits = predicted.unflatten(-1, (adapter.classes, -1)).transpose(1, 2)
            each = F.cross_entropy(logits, target.masked_fill(~counts, 0), reduction="none")
        else:
            each = (predicted - target).square() if task.loss == "mse" else (predicted - target).abs()
        weight = counts if masked is None else counts & masked[..., None]
        each = torch.where(weight, each, 0.0)
        number = weight.flatten(1).sum(1)
        some = number > 0
        rows = each.flatten(1).sum(1) / number.clamp(min=1)
        return rows.sum() / some.sum().clamp(min=1), 1.0


@torch.no_grad()
def _target(task: Task, adapter: ModalityAdapter, batch: Batch) -> tuple[Tensor, Tensor]:
    """Targets [B,N,F], and which of them count, broadcast to the same shape."""
    value, valid = batch[adapter.field], batch.get(f"{adapter.field}_valid")
    if task.target == "standardized":
        value = truncated_standardize(value, valid)
    target = adapter.patches(value)
    ignored = getattr(adapter, "ignore_index", None)
    counts = torch.ones_like(target, dtype=torch.bool) if ignored is None else target != ignored
    if valid is not None:
        cells = patchify(valid[:, None], adapter.patch)
        counts = counts & cells.repeat(1, 1, target.shape[-1] // cells.shape[-1])
    if task.target == "patch_norm":
        var, mean = torch.var_mean(target.float(), -1, keepdim=True, correction=int(target.shape[-1] > 1))
        target = (target - mean) / (var + 1e-6).sqrt()
    return target, counts
