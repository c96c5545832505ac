"""A linear readout of frozen features."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from quire.datasets.splits import stratified_split
from quire.errors import ConfigError
from quire.roles.probes.features import Features
from quire.roles.probes.probe import TINY_VIT, Probe, tiny_run
from quire.roles.probes.subject import Subject
from quire.schedule import WarmupCosine

L2 = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Penalties on the mean loss that the exact solve chooses from, strongest first."""
SMALL = 5e7
"""The exact solve is for samples x features x classes up to this."""
BATCH = 256


def standardise(train: Tensor, judged: Tensor) -> tuple[Tensor, Tensor]:
    """A BatchNorm without weights whose statistics are those of all training features: [N,D], [M,D] → the same."""
    mean, scale = train.mean(0), (train.var(0, unbiased=False) + 1e-5).rsqrt()
    return (train - mean) * scale, (judged - mean) * scale


def solve(train: Tensor, labels: Tensor, judged: Tensor) -> tuple[Tensor, float]:
    """Multinomial logistic regression solved to the end.

    The L2 penalty is the one with the least cross-entropy on a held-out fifth of the training samples (of ten or
    more); the final fit is on all of them.

    Args:
        train: [N,D].
        labels: [N] int64.
        judged: [M,D].

    Returns:
        Predicted classes [M], and the penalty.
    """
    if labels.unique().numel() == 1:
        return labels[:1].expand(len(judged)), L2[0]
    chosen = 1e-2
    rest, held = stratified_split(labels, max(1, len(labels) // 5))
    if len(labels) >= 10 and labels[rest].unique().numel() > 1:
        losses = [_loss(model, train[held], labels[held]) for model in _fits(train[rest], labels[rest], L2)]
        chosen = L2[losses.index(min(losses))]
    (final,) = _fits(train, labels, (chosen,))
    return torch.from_numpy(final.predict(judged.double().numpy())), chosen


def _fits(x: Tensor, y: Tensor, penalties: tuple[float, ...]) -> Iterator[Any]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=500, tol=1e-5, warm_start=True)
    for penalty in penalties:
        model.C = 1 / (penalty * len(x))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(x.double().numpy(), y.numpy())
        yield model


def _loss(model: Any, x: Tensor, y: Tensor) -> float:
    known = torch.from_numpy(model.classes_)
    given = torch.from_numpy(model.predict_proba(x.double().numpy()))
    right = (given * (known == y[:, None])).sum(1)  # 0 for a class that was held out whole
    return float(-right.clamp(min=1e-12).log().mean())


def descend(
    train: Tensor, labels: Tensor, judged: Tensor, classes: int, epochs: int, lr: float, seed: int = 0
) -> Tensor:
    """A linear layer from zero by SGD with momentum 0.9 and a cosine, batch 256: for many samples. Returns [M]."""
    head = nn.Linear(train.shape[1], classes, device=train.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    with torch.enable_grad():
        for rows in sgd(head, len(train), epochs, lr, 0.0, seed):
            cross_entropy(head(train[rows]), labels[rows]).backward()
    return torch.cat([head(part).argmax(1) for part in judged.split(8192)])


def sgd(module: nn.Module, samples: int, epochs: int, lr: float, warmup: float, seed: int) -> Iterator[Tensor]:
    """Shuffled batches of indices; after each is used, one step of SGD (momentum 0.9, warm-up, cosine to 0)."""
    place = next(module.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9)
    curve = WarmupCosine(warmup)
    size = min(BATCH, samples)
    total, step = epochs * (samples // size), 0
    for _ in range(epochs):
        order = torch.randperm(samples, generator=generator).to(place)
        for start in range(0, samples - size + 1, size):
            optimizer.param_groups[0]["lr"] = lr * curve.factor(step, total)
            optimizer.zero_grad()
            yield order[start : start + size]
            optimizer.step()
            step += 1


class LinearProbe(Probe):
    """Accuracy of a linear layer on frozen features: a BatchNorm without weights, then multinomial logistic regression.

    Small data is solved exactly, the L2 penalty chosen on a held-out fifth of the training samples; large data by
    SGD (momentum 0.9, batch 256, cosine). Labels of the judged split choose nothing.

    Args:
        pooling: ``mean`` over real tokens, or ``class``.
        epochs: Passes of SGD.
        lr: Learning rate of SGD.
        solver: ``exact``, ``sgd``, or ``auto``: exact up to 5e7 samples x features x classes.
        every: Epochs between two measurements; 0 is only at the end of ``fit``, in ``validate`` and ``test``.
        max_train: At most this many training samples; null takes all.
        layer: Hidden states of this layer before the final norm, null for the encoder's output.
        label: Name in the log.

    Returns:
        Logs ``val/linear`` in [0,1], ``val/linear_random`` (the same encoder untrained) and ``val/linear_raw`` (the
        input itself); writes ``probe_linear.csv`` and ``.json``.

    Raises:
        ConfigError: ``epochs`` below 1, ``lr`` not above 0, class pooling without a class token.
    """

    def __init__(
        self,
        pooling: Literal["mean", "class"] = "mean",
        epochs: int = 90,
        lr: float = 0.1,
        solver: Literal["auto", "exact", "sgd"] = "auto",
        every: int = 0,
        max_train: int | None = None,
        layer: int | None = None,
        label: str = "linear",
    ) -> None:
        super().__init__(label, every, max_train, pooling, layer)
        if epochs < 1 or not lr > 0:
            raise ConfigError(f"LinearProbe needs epochs of at least 1 and lr above 0, got {epochs} and {lr}")
        if solver not in ("auto", "exact", "sgd"):
            raise ConfigError(f"LinearProbe.solver must be auto, exact or sgd, got {solver!r}")
        self.epochs, self.lr, self.solver = epochs, lr, solver

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Judge a small ViT that learnt digits."""
        return tiny_run("LinearProbe", TINY_VIT)

    def predict(
        self, train: Features, judged: Features, classes: int, subject: Subject
    ) -> tuple[Tensor, dict[str, Any]]:
        """Fit and answer."""
        x, z = standardise(train.values, judged.values)
        y = train.need_label(self)
        small = x.shape[0] * x.shape[1] * classes <= SMALL
        if self.solver == "exact" or (self.solver == "auto" and small):
            found, penalty = solve(x, y, z)
            return found, {"solver": "exact", "l2": penalty}
        where = subject.device
        found = descend(x.to(where), y.to(where), z.to(where), classes, self.epochs, self.lr, subject.seed)
        return found, {"solver": "sgd", "epochs": self.epochs, "lr": self.lr}
