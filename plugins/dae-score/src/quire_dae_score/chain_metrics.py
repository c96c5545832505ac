"""How good chains are: against a known density, against data, and against each other. Read by ``predict``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.contracts import Batch, Metric
from quire.errors import ConfigError
from quire.model import Model
from quire_dae_score.denoiser import GaussianDenoiser, denoiser_of
from quire_dae_score.densities import Density
from quire_dae_score.mixing import effective_samples
from quire_dae_score.modules import tiny_run
from quire_dae_score.toy import density_of

CELLS, FINE = 24, 4
"""Cells a side of the grid of GridKL, and points a side inside one."""
MOST = 1000
"""Rows a side of the kernel's tables in MMD."""


class _OfChains(Metric):
    """Keeps tensors of every batch of chains; subclasses say which and what they add up to."""

    objective: GaussianDenoiser
    higher_is_better: bool | None = False
    full_state_update = False
    kept: list[Tensor]
    beside: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("kept", "beside"):
            self.add_state(name, [], dist_reduce_fx="cat")

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Short chains on two modes in the plane."""
        return tiny_run(sampler={}, metrics=[cls.__name__])

    def sampled(self, model: Model, batch: Batch, results: Any) -> None:
        """Read the chains of one batch; other samplers have none."""
        if isinstance(results, dict) and "samples" in results:
            self.update(model, batch, results["samples"].detach().flatten(2))

    def update(self, model: Model, batch: Batch, chains: Tensor) -> None:
        """Keep one batch's chains [B,K,D]."""
        self.kept.append(chains)

    def compute(self) -> Tensor:
        """The number; NaN before any chain."""
        kept, beside = _joined(self.kept), _joined(self.beside)
        return torch.tensor(float("nan")) if kept is None else self.measure(kept, beside)

    def measure(self, chains: Tensor, beside: Tensor | None) -> Tensor:
        """The number of everything that was kept."""
        raise NotImplementedError


class GridKL(_OfChains):
    """KL divergence of the chains' histogram from p_σ, on 24x24 cells of the plane. After Alain and Bengio 2012.

    Returns:
        Nats; draws of p_σ itself have about 575/(2N) for N independent ones.

    Raises:
        ConfigError: data whose density isn't known.
    """

    def sampled(self, model: Model, batch: Batch, results: Any) -> None:
        """Note what the truth is, too."""
        self.truth: tuple[Density, float] = density_of(model, self), denoiser_of(model, self).sigma
        super().sampled(model, batch, results)

    def measure(self, chains: Tensor, beside: Tensor | None) -> Tensor:
        """Of all kept states."""
        return grid_kl(chains.flatten(0, 1), *self.truth)


class MMD(_OfChains):
    """Squared maximum mean discrepancy between chains and the data with noise of σ. After Alain and Bengio 2012.

    The data are the rows that the chains started at, so no density need be known. At most 1000 states and rows.

    Returns:
        The unbiased estimate with a Gaussian kernel of the median distance: 0 on average where both have one law.
    """

    def update(self, model: Model, batch: Batch, chains: Tensor) -> None:
        """Keep the chains, and their starts with noise."""
        super().update(model, batch, chains)
        self.beside.append(noised_starts(model, batch, self))

    def measure(self, chains: Tensor, beside: Tensor | None) -> Tensor:
        """Of states spread evenly over chains and time."""
        assert beside is not None, "update keeps both"
        return mmd(chains.flatten(0, 1), beside)


class EffectiveSamples(_OfChains):
    """Independent draws that all chains together are worth, in their worst coordinate. After Alain and Bengio 2012.

    Chains that stay in different modes count as one long correlated one, so a mode that is never left shows.

    Returns:
        A number of draws, at most about the number of kept states.
    """

    higher_is_better = True

    def measure(self, chains: Tensor, beside: Tensor | None) -> Tensor:
        """The least over coordinates that move at all."""
        moves = chains.flatten(0, 1).amax(0) > chains.flatten(0, 1).amin(0)
        return effective_samples(chains[..., moves]).min() if bool(moves.any()) else torch.tensor(1.0)


class NearestTraining(_OfChains):
    """Distance of the chains' ends to the nearest training sample, over that of held-out data. Not in the paper.

    After Alain and Bengio 2012's question what a chain's samples are like. Held-out data are the chains' starts with
    noise of σ.

    Returns:
        A ratio: 1 is as near as new data, far below 1 memorised, far above 1 lost.

    Raises:
        ConfigError: no data module.
    """

    def update(self, model: Model, batch: Batch, chains: Tensor) -> None:
        """Keep both distances of one batch."""
        train, _ = training_rows(model, self)
        starts = noised_starts(model, batch, self)
        self.kept.append(torch.cdist(chains[:, -1], train).amin(1))
        self.beside.append(torch.cdist(starts, train).amin(1))

    def measure(self, chains: Tensor, beside: Tensor | None) -> Tensor:
        """The quotient of the means."""
        assert beside is not None, "update keeps both"
        return chains.mean() / beside.mean()


class ClassCoverage(_OfChains):
    """How many classes the chains' ends are in, by a linear classifier of the training data. Not in the paper.

    After Alain and Bengio 2012's question what a chain's samples are like. Logistic regression is fitted once.

    Returns:
        Classes with at least one in a hundred ends.

    Raises:
        ConfigError: data without labels.
    """

    higher_is_better = True

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Short chains on digits."""
        denoiser = {"sigma": 0.3, "residual": False}
        autoencoder = {"encoder": "MlpVectorEncoder", "decoder": "MlpVectorDecoder"}
        run = tiny_run(denoiser, {"step": 0.05}, metrics=["ClassCoverage"], **autoencoder)
        run["model"]["objective"]["init_args"].pop("field")
        return {**run, "data": {"class_path": "Digits", "init_args": {"train_samples": 256}}}

    def update(self, model: Model, batch: Batch, chains: Tensor) -> None:
        """Keep the classes of one batch's ends."""
        from sklearn.linear_model import LogisticRegression

        if getattr(self, "classifier", None) is None:
            train, label = training_rows(model, self)
            if label is None:
                raise ConfigError("ClassCoverage needs data with labels: drop it from model.metrics")
            self.classifier = LogisticRegression(max_iter=500).fit(train.cpu().numpy(), label.cpu().numpy())
        found = self.classifier.predict(chains[:, -1].cpu().numpy())
        self.kept.append(torch.from_numpy(found).to(chains.device))

    def measure(self, chains: Tensor, beside: Tensor | None) -> Tensor:
        """Count."""
        counts = torch.unique(chains, return_counts=True)[1]
        return (counts >= 0.01 * len(chains)).sum().float()


# ---- measures
def grid_kl(points: Tensor, density: Density, sigma: float) -> Tensor:
    """KL(histogram of points [N,2] ‖ p_σ) in nats; everything outside the grid is one more cell."""
    half = density.half + 3 * sigma
    fine = (torch.arange(CELLS * FINE, dtype=torch.double) + 0.5) * (2 * half / (CELLS * FINE)) - half
    level = density.log_prob(torch.cartesian_prod(fine, fine), sigma)
    mass = level.exp().view(CELLS, FINE, CELLS, FINE).sum((1, 3)).flatten() * (2 * half / (CELLS * FINE)) ** 2
    place = ((points.double().cpu() + half) / (2 * half) * CELLS).floor().long()
    inside = ((place >= 0) & (place < CELLS)).all(1)
    cell = torch.where(inside, place[:, 0] * CELLS + place[:, 1], CELLS**2)
    found = torch.bincount(cell, minlength=CELLS**2 + 1).double() / len(cell)
    true = torch.cat([mass, (1 - mass.sum()).clamp_min(1e-9)[None]]).clamp_min(1e-300)
    return (found * (found.clamp_min(1e-300) / true).log()).sum()


def mmd(ours: Tensor, theirs: Tensor) -> Tensor:
    """The unbiased squared MMD of two sets of rows, with a Gaussian kernel of the second set's median distance."""
    ours, theirs = _thinned(ours).double(), _thinned(theirs).double()
    among = torch.cdist(theirs, theirs)
    off = ~torch.eye(len(theirs), dtype=torch.bool, device=theirs.device)
    width = among[off].median().clamp_min(1e-12)

    def kernel(distance: Tensor) -> Tensor:
        return torch.exp(-distance.square() / (2 * width**2))

    own = kernel(torch.cdist(ours, ours))
    within = (own.sum() - own.diagonal().sum()) / (len(ours) * (len(ours) - 1))
    return within + kernel(among)[off].mean() - 2 * kernel(torch.cdist(ours, theirs)).mean()


def noised_starts(model: Model, batch: Batch, asker: object) -> Tensor:
    """The batch's rows [B,D] with noise of σ: draws of what chains should sample."""
    denoiser = denoiser_of(model, asker)
    x = denoiser.clean(batch)
    draws = model.generator("cpu")
    noise = torch.randn(x.shape, generator=draws).to(x)
    return (x + denoiser.sigma * noise).flatten(1)


def training_rows(model: Model, asker: object) -> tuple[Tensor, Tensor | None]:
    """The denoised field of all training data [N,D] as the model sees it, and its labels."""
    source = model.datamodule
    if source is None:
        raise ConfigError(f"{type(asker).__name__} looks at the training split of a data module: give data as one")
    field, apart = denoiser_of(model, asker).field, torch.Generator(model.device).manual_seed(source.seed)
    rows, labels, data = [], [], source.dataset("train")
    for start in range(0, len(data), 1024):
        places = list(range(start, min(start + 1024, len(data))))
        fetch = getattr(data, "__getitems__", None)
        batch = fetch(places) if fetch else [data[i] for i in places]
        batch = batch if isinstance(batch, dict) else source.collate(batch)
        batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        batch = source.transform(batch, apart, training=False)
        rows.append(batch[field].flatten(1))
        labels += [batch["label"]] if "label" in batch else []
    return torch.cat(rows), torch.cat(labels) if labels else None


def _thinned(rows: Tensor) -> Tensor:
    return rows[torch.linspace(0, len(rows) - 1, min(MOST, len(rows)), device=rows.device).round().long()]


def _joined(parts: Any) -> Tensor | None:
    if isinstance(parts, Tensor):  # torchmetrics joins them when it syncs
        return parts
    return torch.cat(parts) if parts else None
