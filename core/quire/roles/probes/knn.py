"""Nearest neighbours as a probe: nothing is learnt, so nothing can be tuned."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from quire.errors import ConfigError
from quire.roles.probes.features import Features
from quire.roles.probes.probe import TINY_VIT, Probe, tiny_run
from quire.roles.probes.subject import Subject


def vote(bank: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float, classes: int) -> Tensor:
    """Cosine nearest neighbours, each voting with exp(similarity / temperature).

    Args:
        bank: [N,D] training features.
        labels: [N] int64.
        queries: [M,D].
        k: Neighbours that vote; at most N.
        temperature: Above 0.
        classes: K.

    Returns:
        [M] predicted classes.
    """
    bank, targets = normalize(bank, dim=1), one_hot(labels, classes).float()
    found = []
    for part in normalize(queries, dim=1).split(max(1, 2**24 // len(bank))):
        near, where = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        weight = ((near - near[:, :1]) / temperature).exp()  # relative to the nearest: no overflow, same winner
        found.append((weight[..., None] * targets[where]).sum(1).argmax(1))
    return torch.cat(found)


class KNNProbe(Probe):
    """Cosine k-nearest-neighbour accuracy of the frozen encoder. The weighting of Wu et al. 2018, arXiv 1805.01978.

    Args:
        k: Neighbours that vote; at most the number of training samples is used.
        temperature: Each votes with exp(similarity / temperature).
        every: Epochs between two measurements; 0 is only at the end of ``fit``, in ``validate`` and ``test``.
        max_train: At most this many training samples are neighbours; null takes all.
        pooling: ``mean`` over real tokens, or ``class``.
        layer: Hidden states of this layer before the final norm, null for the encoder's output.
        label: Name in the log.

    Returns:
        Logs ``val/knn`` in [0,1], ``val/knn_random`` (the same encoder untrained) and ``val/knn_raw`` (the input
        itself); writes ``probe_knn.csv`` and ``.json``.

    Raises:
        ConfigError: ``k`` below 1, ``temperature`` not above 0, class pooling without a class token.
    """

    def __init__(
        self,
        k: int = 20,
        temperature: float = 0.07,
        every: int = 1,
        max_train: int | None = 10000,
        pooling: Literal["mean", "class"] = "mean",
        layer: int | None = None,
        label: str = "knn",
    ) -> None:
        super().__init__(label, every, max_train, pooling, layer)
        if k < 1 or not temperature > 0:
            raise ConfigError(f"KNNProbe needs k of at least 1 and temperature above 0, got {k} and {temperature}")
        self.k, self.temperature = k, temperature

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Watch a small ViT learn digits."""
        return tiny_run("KNNProbe", TINY_VIT, k=5)

    def predict(
        self, train: Features, judged: Features, classes: int, subject: Subject
    ) -> tuple[Tensor, dict[str, Any]]:
        """The votes."""
        where = subject.device
        found = vote(
            train.values.to(where),
            train.need_label(self).to(where),
            judged.values.to(where),
            self.k,
            self.temperature,
            classes,
        )
        return found, {"k": min(self.k, len(train)), "temperature": self.temperature}
