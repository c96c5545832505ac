"""Classification: the objective of fine-tuning, and of every labelled baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from quire.contracts import Batch, Encoder, Losses, Objective, Spec
from quire.errors import ConfigError, DataError
from quire.roles.latent.contract import Classifier
from quire.roles.probes.features import check_class_token, check_pooling, pooled

if TYPE_CHECKING:
    from quire.model import Model


class Classify(Objective):
    """Cross-entropy between the sample's label and logits from the codes. Mixup: Zhang et al. 2018, arXiv 1710.09412.

    Where ``model.decoder`` gives logits (role Classifier) these are taken; else the objective owns a head on the
    pooled codes. Smoothing and mixup are for training only: validation and test report the plain cross-entropy.
    Fine-tuning is this with ``encoder: {class_path: Pretrained, init_args: {path: …, freeze: false}}``.

    Args:
        pooling: ``mean`` over real tokens (padding and prefix excluded), or ``class`` for the first prefix token.
        hidden: Width of one hidden layer of the head; 0 is a linear head.
        label_smoothing: Share of the target spread evenly over all classes, in [0, 1).
        mixup: Both parameters of the Beta distribution of the mixing share; 0 mixes nothing. Mixes every float
            field of the batch.

    Needs:
        encoder: any whose codes have a vector a sample: Tokens, VectorCodes, LatentCodes. Field: label.

    Returns:
        ``classify``: mean cross-entropy in nats, ln K at chance. Metric ``accuracy`` in [0,1] (under mixup: of the
        label with the larger share). Output ``logits`` [B,K].

    Raises:
        ConfigError: a value out of its range, class pooling without a class token, a head asked for beside a
            decoder that gives logits, mixup of a batch without float fields.
        DataError: a label that is no class.
    """

    encoder: Encoder
    fields = ("label",)
    decides = False  # whether model.decoder gives the logits

    def __init__(
        self,
        pooling: Literal["mean", "class"] = "mean",
        hidden: int = 0,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
    ) -> None:
        super().__init__()
        check_pooling(pooling, self)
        if hidden < 0 or mixup < 0:
            raise ConfigError(f"Classify.hidden and mixup must be at least 0, got {hidden} and {mixup}")
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"Classify.label_smoothing must be in [0, 1), got {label_smoothing}")
        self.pooling, self.hidden, self.label_smoothing, self.mixup = pooling, hidden, label_smoothing, mixup

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small ViT on digits."""
        encoder = {"class_path": "ViTEncoder", "init_args": {"patch": 4, "width": 16, "depth": 1, "heads": 2}}
        return {"model": {"encoder": encoder, "objective": "Classify"}, "data": "Digits"}

    def check(self, model: Model) -> None:
        """Note who gives the logits."""
        self.decides = model.decoder is not None and model.decoder.role(Classifier) is not None
        if self.decides and self.hidden:
            name = type(model.decoder).__name__
            raise ConfigError(f"Classify.hidden is {self.hidden}, but model.decoder {name} gives the logits: drop one")

    def build(self, spec: Spec) -> None:
        """Make the head, unless the decoder is one."""
        if self.decides:
            return
        check_class_token(spec.get("codes") or {}, self.pooling, self)
        width, self.classes = int(spec.code("width", self)), int(spec.need("classes", self))
        if self.hidden:
            layers = [nn.Linear(width, self.hidden), nn.GELU(), nn.Linear(self.hidden, self.classes)]
            self.head: nn.Module = nn.Sequential(*layers)
        else:
            self.head = nn.Linear(width, self.classes)

    def forward(self, model: Model, batch: Batch) -> Losses:
        """The term ``classify`` of one batch."""
        label = batch["label"]
        if not self.training:
            logits = self.logits(model, batch)
            return _losses(cross_entropy(logits, _checked(label, logits)), logits, label)
        if not self.mixup:
            logits = self.logits(model, batch)
            loss = cross_entropy(logits, _checked(label, logits), label_smoothing=self.label_smoothing)
            return _losses(loss, logits, label)
        share, other = self._draw(model, len(label))
        logits = self.logits(model, mixed(batch, share, other))
        first, second = (
            cross_entropy(logits, _checked(y, logits), label_smoothing=self.label_smoothing)
            for y in (label, label[other])
        )
        larger = label if share >= 0.5 else label[other]
        return _losses(share * first + (1 - share) * second, logits, larger)

    def logits(self, model: Model, batch: Batch) -> Tensor:
        """[B,K] of one batch."""
        codes = model.encoder(batch)
        if self.decides:
            return model.decoder.role(Classifier)(codes)
        return self.head(pooled(codes, self.pooling))

    def _draw(self, model: Model, count: int) -> tuple[float, Tensor]:
        """The share of the first label, one for the batch, and who is mixed with whom."""
        generator = model.generator("cpu")
        seed = int(torch.randint(2**31, (), generator=generator))
        share = float(np.random.default_rng(seed).beta(self.mixup, self.mixup))  # torch's Beta takes no generator
        return share, torch.randperm(count, generator=generator).to(model.device)


def mixed(batch: Batch, share: float, other: Tensor) -> Batch:
    """``share`` of every float field plus the rest of sample ``other``'s; a real token of either is real.

    Raises:
        ConfigError: no float field to mix.
    """
    floats = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.is_floating_point()}
    if not floats:
        raise ConfigError(f"Classify.mixup mixes float fields; the batch has only {', '.join(batch)}: set mixup: 0")
    made = {**batch, **{k: share * v + (1 - share) * v[other] for k, v in floats.items()}}
    mask = batch.get("mask")
    return made if mask is None else {**made, "mask": mask | mask[other]}


def _checked(label: Tensor, logits: Tensor) -> Tensor:
    if not label.is_cuda:  # asking the GPU would wait for it
        bad = (label < 0) | (label >= logits.shape[1])
        if bool(bad.any()):
            place = int(bad.nonzero()[0])
            raise DataError(f"label of sample {place} is {int(label[place])}; there are {logits.shape[1]} classes")
    return label


def _losses(loss: Tensor, logits: Tensor, label: Tensor) -> Losses:
    return Losses(
        {"classify": loss},
        {"accuracy": lambda: (logits.argmax(1) == label).float().mean()},
        {"logits": logits},
    )
