"""Baselines that don't forget either: nearest class mean and nearest neighbours. For the claim of Träuble et al. 2023.

Their predictions owe nothing to gradients. One number is trained, the scale of the logits, so that cross-entropies can
be compared; it doesn't change which class is largest.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from quire.contracts import Spec
from quire.errors import ConfigError
from quire.roles.latent.contract import Classifier, VectorCodes, VectorEncoder, vector_of
from quire.roles.sparse.ranks import ranks, sum_over_ranks
from quire_dkvb.stream import whole

UNSEEN = 10.0
"""How far below the worst known class the logit of an unknown one lies."""


def _tiny(decoder: Any) -> dict[str, Any]:
    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.1}}
    model = {"encoder": "FlatPixels", "decoder": decoder, "objective": "Classify", "optimizer": adam}
    return {"model": model, "data": "Digits"}


class _Remembering(Classifier):
    """Remembers codes of training samples as they come by.

    ``seen`` is what the last training batch's codes were; ``Remember`` pairs them with the labels.
    """

    encoder: VectorEncoder

    def build(self, spec: Spec) -> None:
        """The scale."""
        self.width, self.classes = int(spec.code("width", self)), int(spec.need("classes", self))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.refer("seen", None)

    def callbacks(self) -> list[Callback]:
        """The one that tells it the labels."""
        return [Remember()]

    def gaps(self, vector: Tensor) -> Tensor:
        """[B,K]: how far each sample is from each class, infinite for unknown classes."""
        raise NotImplementedError

    def learn(self, vector: Tensor, label: Tensor, index: Tensor | None) -> None:
        """Remember a batch."""
        raise NotImplementedError

    def forward(self, codes: VectorCodes) -> Tensor:
        """VectorCodes [B,D] → logits [B,K]."""
        vector = vector_of(codes, self).detach().float()
        if self.training:
            self.refer("seen", vector)
        with torch.no_grad():
            gaps = self.gaps(vector)
        known = gaps.isfinite()
        logits = -self.log_scale.exp() * gaps.masked_fill(~known, 0.0)
        worst = logits.masked_fill(~known, torch.inf).amin(1, keepdim=True).nan_to_num(posinf=0.0)
        return torch.where(known, logits, worst - UNSEEN * known.any())

    seen: Any


class Remember(Callback):
    """Tells a baseline the labels of what it has seen, after the step. ``NearestMean`` and others bring it along."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse more samples than there is room for."""
        decoder, source = pl_module.find(_Remembering), pl_module.datamodule
        if isinstance(decoder, NearestNeighbours) and source is not None:
            count = len(whole(source, "train"))  # type: ignore[arg-type]
            if count > decoder.memory:
                raise ConfigError(
                    f"NearestNeighbours.memory is {decoder.memory}, but there are {count} training samples: raise it"
                )

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Codes and labels of one batch."""
        decoder = pl_module.find(_Remembering)
        if decoder.seen is not None:
            decoder.learn(decoder.seen, batch["label"], batch.get("index"))
            decoder.refer("seen", None)


class NearestMean(_Remembering):
    """Class of the nearest mean of the training codes: a baseline that needs no gradient and forgets nothing.

    Means are running sums over the stream, each sample as often as it comes by. A control for Träuble et al. 2023.

    Needs:
        encoder: VectorEncoder, frozen.

    Returns:
        Logits [B,K] of VectorCodes [B,D]: minus distance over sqrt(D), times a trained scale.
    """

    total: Tensor
    count: Tensor

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """On raw pixels of digits."""
        return _tiny("NearestMean")

    def build(self, spec: Spec) -> None:
        """A sum and a count a class."""
        super().build(spec)
        self.register_buffer("total", torch.zeros(self.classes, self.width))
        self.register_buffer("count", torch.zeros(self.classes))

    def gaps(self, vector: Tensor) -> Tensor:
        """To the means, over sqrt(D)."""
        means = self.total / self.count.clamp(min=1)[:, None]
        return torch.cdist(vector, means).masked_fill(self.count == 0, torch.inf) / self.width**0.5

    def learn(self, vector: Tensor, label: Tensor, index: Tensor | None) -> None:
        """Add a batch to the sums, of all processes."""
        total = torch.zeros_like(self.total).index_add_(0, label, vector)
        count = torch.zeros_like(self.count).index_add_(0, label, torch.ones_like(label, dtype=vector.dtype))
        self.total += sum_over_ranks(total)
        self.count += sum_over_ranks(count)


class NearestNeighbours(_Remembering):
    """Class of most of the k nearest training codes: a baseline that keeps every sample and forgets nothing.

    Equal votes go to the class with the nearest sample. A control for Träuble et al. 2023.

    Args:
        k: Neighbours that vote.
        memory: Room for training samples; a sample that comes again takes its old place.

    Needs:
        encoder: VectorEncoder, frozen. Field: index.

    Returns:
        Logits [B,K] of VectorCodes [B,D]: votes minus d / (1 + d), d the distance to a class's nearest sample, times a
        trained scale.

    Raises:
        ConfigError: ``k`` or ``memory`` below 1, or more training samples than ``memory``.
    """

    bank: Tensor
    labels: Tensor

    def __init__(self, k: int = 1, memory: int = 10_000) -> None:
        super().__init__()
        if k < 1 or memory < 1:
            raise ConfigError(f"NearestNeighbours needs k and memory of at least 1, got {k} and {memory}")
        self.k, self.memory = k, memory

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """On raw pixels of digits."""
        return _tiny({"class_path": "NearestNeighbours", "init_args": {"memory": 2000}})

    def build(self, spec: Spec) -> None:
        """Room for the samples; label -1 is empty."""
        super().build(spec)
        self.register_buffer("bank", torch.zeros(self.memory, self.width))
        self.register_buffer("labels", torch.full((self.memory,), -1))

    def gaps(self, vector: Tensor) -> Tensor:
        """Votes that a class lacks, plus less than one for how far its nearest sample is."""
        filled = self.labels >= 0
        bank, labels = self.bank[filled], self.labels[filled].expand(len(vector), -1)
        every = torch.cdist(vector, bank)
        far = vector.new_full((len(vector), self.classes), torch.inf)
        least = far.scatter_reduce(1, labels, every, "amin")
        near = every.topk(min(self.k, len(bank)), dim=1, largest=False).indices
        votes = torch.zeros_like(far).scatter_add_(1, labels.gather(1, near), torch.ones_like(near, dtype=far.dtype))
        return torch.where(least.isfinite(), self.k - votes + least / (1 + least), torch.inf)

    def learn(self, vector: Tensor, label: Tensor, index: Tensor | None) -> None:
        """Put a batch in its places, of all processes."""
        assert index is not None
        if ranks() == 1:
            self.bank[index], self.labels[index] = vector, label
            return
        bank, labels, times = torch.zeros_like(self.bank), torch.zeros_like(self.labels), torch.zeros_like(self.labels)
        bank[index], labels[index], times[index] = vector, label, 1
        bank, labels, times = sum_over_ranks(bank), sum_over_ranks(labels), sum_over_ranks(times)
        places = times.nonzero()[:, 0]  # several processes may have been given one sample
        self.bank[places] = bank[places] / times[places, None]
        self.labels[places] = labels[places] // times[places]
