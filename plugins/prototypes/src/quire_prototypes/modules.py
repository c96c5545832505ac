"""The prototype layer: codes → distances to learnt, decodable cases → logits, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from quire.contracts import Batch, Decoder, Role, Spec, build
from quire.errors import ConfigError, DataError
from quire.model import Model
from quire.roles.latent import Classifier, PixelDecoder, VectorCodes, VectorEncoder, need_vectors, vector_of
from quire_prototypes.distances import squared_distances

AUTOENCODER = {
    "encoder": "MlpVectorEncoder",
    "decoder": {"class_path": "PrototypeLayer", "init_args": {"decoder": "MlpVectorDecoder"}},
}
"""A small autoencoder round the layer, for the tiny examples."""


@dataclass
class Explanation:
    """Why the layer answered as it did: for every sample its prototypes, nearest first.

    Attributes:
        logits: [B,K]. prediction: [B], the class with the largest logit.
        prototype: [B,m] int64, prototypes by distance.
        distance: [B,m], squared, to each of these.
        weight: [B,m], from each of these to the predicted class.
        contribution: [B,m], distance times weight; a row sums to the predicted class's logit.
        owner: [B,m], the class that each of these votes for.
    """

    logits: Tensor
    prediction: Tensor
    prototype: Tensor
    distance: Tensor
    weight: Tensor
    contribution: Tensor
    owner: Tensor


class PrototypeLayer(Classifier):
    """Logits as weighted squared distances to learnt prototypes, which a decoder turns into images. Li et al. 2018.

    D_ij = ‖f(x_i) − p_j‖² and logits = D·W without a bias, so each logit is exactly the sum of its prototypes'
    contributions D_ij·W_jk. W is learnt freely; a large distance must lower the logit of the prototype's own class,
    which is therefore argmin_k W_jk, the most negative weight.

    Args:
        decoder: Turns a code into data; a PixelDecoder makes prototypes visible. Null: no pictures, no
            reconstruction.
        prototypes: How many, m.
        init: ``"uniform"`` in [0, 1] as the official code; ``"examples"``: codes of training samples, even over
            classes; ``"kmeans"`` centres of the training codes; or ``"FILE#TENSOR"``, a tensor in a checkpoint or
            .safetensors file whose rows are codes (the keys of a bottleneck, other prototypes). The last three are
            not in the paper and happen when training starts.
        weight_init: ``"uniform"`` in [0, 1] as the official code; ``"assigned"`` (not in the paper): classes in turn,
            0 to a prototype's own class and 1 to the others, so that every class starts with one.

    Returns:
        Logits [B,K] of VectorCodes [B,q]. In the role PixelDecoder it offers its ``decoder``.

    Raises:
        ConfigError: ``prototypes`` not positive, an encoder without vectors, a decoder of another width.

    Paper: Li, Liu, Chen, Rudin, "Deep Learning for Case-Based Reasoning through Prototypes", AAAI 2018,
    arXiv 1710.04806.
    """

    prototypes: nn.Parameter
    class_weights: nn.Parameter
    started: Tensor

    def __init__(
        self,
        decoder: Decoder | None = None,
        prototypes: int = 15,
        init: str = "uniform",
        weight_init: Literal["uniform", "assigned"] = "uniform",
    ) -> None:
        super().__init__()
        if prototypes <= 0:
            raise ConfigError(f"prototypes must be positive, got {prototypes}")
        if init not in ("uniform", "examples", "kmeans") and "#" not in init:
            raise ConfigError(f"PrototypeLayer.init must be uniform, examples, kmeans or FILE#TENSOR, got {init!r}")
        if weight_init not in ("uniform", "assigned"):
            raise ConfigError(f"PrototypeLayer.weight_init must be uniform or assigned, got {weight_init!r}")
        self.decoder, self.count, self.init, self.weight_init = decoder, prototypes, init, weight_init

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Fifteen prototypes on a small autoencoder of digits."""
        return {"model": {**AUTOENCODER, "objective": "CaseBasedReasoning"}, "data": "Digits"}

    # ---- life
    def check(self, model: Model) -> None:
        """Distances need one vector a sample."""
        need_vectors(model.encoder, self)
        if model.encoder is None:
            raise ConfigError("PrototypeLayer needs a VectorEncoder; model.encoder is not set")

    def build(self, spec: Spec) -> None:
        """Prototypes [m,q] and weights [m,K]; q from the encoder, K from the data."""
        width, classes = int(spec.code("width", self)), int(spec.need("classes", self))
        if self.count < classes:
            rank_zero_warn(f"{self.count} prototypes for {classes} classes: some classes cannot own one")
        if self.decoder is not None:
            build(self.decoder, spec)
            expected = self.decoder.__dict__["built_with"].code("width", self)
            if expected != width:  # a pretrained decoder brings the width it was trained with
                raise ConfigError(f"decoder expects {expected} features, prototypes have {width}")
        self.prototypes = nn.Parameter(torch.rand(self.count, width))
        self.class_weights = nn.Parameter(torch.rand(self.count, classes))
        if self.weight_init == "assigned":
            own = torch.arange(self.count)[:, None] % classes == torch.arange(classes)[None]
            self.class_weights.data.copy_((~own).float())
        # in the checkpoint, so that a resumed or reused layer isn't started again
        self.register_buffer("started", torch.tensor(self.init == "uniform"))

    def callbacks(self) -> list[Callback]:
        """Pictures where prototypes can be decoded, and the start on training data where ``init`` asks for it."""
        from quire_prototypes.callbacks import PrototypeImages, StartPrototypes

        found: list[Callback] = [] if self.init == "uniform" else [StartPrototypes(self)]
        return [*found, PrototypeImages()] if self.role(PixelDecoder) else found

    def role(self, role: type[Role]) -> Role | None:
        """Itself, or what the inner decoder offers: PixelDecoder for one."""
        return self if isinstance(self, role) else self.decoder.role(role) if self.decoder is not None else None

    # ---- use
    def distances(self, codes: VectorCodes) -> Tensor:
        """Squared distances [B,m] float32 of each code to each prototype."""
        return squared_distances(vector_of(codes, self), self.prototypes)

    def vote(self, distances: Tensor) -> Tensor:
        """Logits [B,K] of distances [B,m]: no bias, or contributions would not sum to them."""
        return distances @ self.class_weights.float()

    def forward(self, codes: VectorCodes) -> Tensor:
        """Codes [B,q] → logits [B,K]."""
        return self.vote(self.distances(codes))

    def reconstruct(self, codes: VectorCodes) -> Tensor:
        """The inner PixelDecoder's image [B,C,H,W] of the codes."""
        return self.pixels()(codes)

    def pictures(self) -> Tensor:
        """The prototypes decoded: [m,C,H,W]."""
        return self.pixels()(VectorCodes(self.prototypes))

    def pixels(self) -> PixelDecoder:
        """The inner PixelDecoder. Raises ``ConfigError`` when there is none."""
        found = self.role(PixelDecoder)
        if found is None:
            have = "is not set" if self.decoder is None else f"is {type(self.decoder).__name__}"
            raise ConfigError(f"this needs a PixelDecoder in PrototypeLayer.decoder, which {have}")
        return found

    def owners(self) -> Tensor:
        """The class that each prototype votes for, [m]: where its weight is most negative."""
        return self.class_weights.argmin(dim=1)

    def explain(self, codes: VectorCodes) -> Explanation:
        """Every prototype's part in the answer, nearest first."""
        distances = self.distances(codes)
        logits = self.vote(distances)
        prediction = logits.argmax(dim=1)
        distance, order = distances.sort(dim=1)
        weight = self.class_weights.float().T[prediction].gather(1, order)
        return Explanation(logits, prediction, order, distance, weight, distance * weight, self.owners()[order])


def layer_of(model: Model) -> PrototypeLayer:
    """The model's prototype layer. Raises ``ConfigError`` when it has none."""
    found = model.find(PrototypeLayer)
    if found is None:
        raise ConfigError("model.decoder must be a PrototypeLayer")
    return found


def codes_of(model: Model, batch: Batch) -> VectorCodes:
    """f(x) of one batch by the model's VectorEncoder. Raises ``ConfigError`` when it has none."""
    encoder = model.find(VectorEncoder)
    if encoder is None:
        raise ConfigError("model.encoder must be a VectorEncoder")
    return encoder(batch)


def check_finite(distances: Tensor, index: Tensor | None = None) -> None:
    """Raise ``DataError`` with the batch's first sample whose distances are not finite."""
    bad = ~torch.isfinite(distances).all(dim=1)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        where = "" if index is None else f" (index {int(index[first])})"
        raise DataError(f"distances to the prototypes are not finite, first for sample {first}{where} of the batch")
