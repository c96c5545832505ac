"""The paper's loss: classify by prototypes, reconstruct, and keep prototypes and examples near each other."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.functional import cross_entropy

from quire.contracts import Batch, Losses, Objective
from quire.errors import ConfigError, DataError
from quire.model import Model
from quire.roles.latent import VectorEncoder
from quire_prototypes.distances import r1, r2
from quire_prototypes.modules import AUTOENCODER, PrototypeLayer, check_finite, codes_of, layer_of


class CaseBasedReasoning(Objective):
    """Cross-entropy on distances to prototypes, reconstruction, R1 and R2. Li et al. 2018.

    L = classify·E + reconstruct·R + r1·R1 + r2·R2. The defaults are the official code's. R1 and R2 are taken over
    the batch, as there; the metrics R1Full and R2Full take all training data.

    Args:
        classify: Weight of E, the mean cross-entropy in nats.
        reconstruct: Weight of R, the squared error summed over pixels, mean over the batch. At 0 nothing is decoded
            and no PixelDecoder is needed.
        r1: Weight of R1, each prototype near some example.
        r2: Weight of R2, each example near some prototype.

    Needs:
        encoder: VectorEncoder. decoder: PrototypeLayer. Fields: label, and image (or vector) to reconstruct.

    Returns:
        ``classify``, ``reconstruct``, ``r1``, ``r2``, unweighted; ``accuracy`` as a metric. A term of weight 0 is
        logged without a gradient.

    Raises:
        ConfigError: a negative weight, or nothing left to train.
        DataError: a label outside the classes, or distances that are not finite.
    """

    encoder: VectorEncoder
    decoder: PrototypeLayer

    def __init__(self, classify: float = 20.0, reconstruct: float = 1.0, r1: float = 1.0, r2: float = 1.0) -> None:
        super().__init__()
        self.weights = {"classify": classify, "reconstruct": reconstruct, "r1": r1, "r2": r2}
        if min(self.weights.values()) < 0 or not any(self.weights.values()):
            said = ", ".join(f"{k}={v:g}" for k, v in self.weights.items())
            raise ConfigError(f"CaseBasedReasoning needs weights >= 0, not all of them 0, got {said}")
        self.fields = ("label", "image|vector") if reconstruct else ("label",)  # type: ignore[misc]
        self._warned = False

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Fifteen prototypes on a small autoencoder of digits."""
        return {"model": {**AUTOENCODER, "objective": "CaseBasedReasoning"}, "data": "Digits"}

    def check(self, model: Model) -> None:
        """Reconstruction needs something that decodes to pixels."""
        if self.weights["reconstruct"]:
            layer_of(model).pixels()

    def forward(self, model: Model, batch: Batch) -> Losses:
        """The terms of one batch."""
        layer = layer_of(model)
        codes = codes_of(model, batch)  # f(x) [B,q]
        distances = layer.distances(codes)  # D [B,m]
        logits = layer.vote(distances)  # D·W [B,K]
        label: Tensor = batch["label"]
        self._check(distances, logits, batch)

        terms = {"classify": cross_entropy(logits, label)}
        outputs: dict[str, Any] = {"codes": codes, "distances": distances, "logits": logits}
        if self.weights["reconstruct"]:
            target: Tensor = batch["image" if "image" in batch else "vector"]  # as the encoder saw it: deformed too
            outputs["reconstruction"] = layer.reconstruct(codes)
            terms["reconstruct"] = summed_error(outputs["reconstruction"], target)
        terms |= {"r1": r1(distances), "r2": r2(distances)}
        terms = {k: v if self.weights[k] else v.detach() for k, v in terms.items()}
        return Losses(terms, {"accuracy": lambda: (logits.argmax(1) == label).float().mean()}, outputs)

    def _check(self, distances: Tensor, logits: Tensor, batch: Batch) -> None:
        label, classes = batch["label"], logits.shape[1]
        wrong = (label < 0) | (label >= classes)
        bad = torch.stack([wrong.any(), ~torch.isfinite(distances).all()]).any()  # one wait for the device
        if bool(bad):
            if bool(wrong.any()):
                raise DataError(f"label {int(label[wrong][0])} is outside the {classes} classes 0..{classes - 1}")
            check_finite(distances, batch.get("index"))
        if self.training and not self._warned and self.weights["r1"] and len(distances) < distances.shape[1]:
            self._warned = True
            rank_zero_warn(
                f"a batch of {len(distances)} is smaller than the {distances.shape[1]} prototypes: R1 sees few "
                "candidates, raise data.batch_size"
            )


def summed_error(reconstruction: Tensor, target: Tensor) -> Tensor:
    """R: squared error summed over pixels, mean over the batch. A mean over pixels would weaken it H·W times."""
    return (reconstruction.float() - target.float()).square().flatten(1).sum(1).mean()
