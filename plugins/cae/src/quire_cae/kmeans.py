"""Patches as words: clusters of raw patches, found on the training split before the first step."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from quire.contracts import Batch, Spec
from quire.errors import ConfigError
from quire.roles.tokens.contract import Layout, TokenEncoder
from quire.roles.tokens.reconstruct import PatchPixels, Target
from quire_cae.examples import tiny_run

MOST = 50_000
"""Patches that the clusters are fitted on, at most."""


class KMeansPatches(Target):
    """Number of the nearest k-means centre of each patch's pixels: a tokenizer without a network.

    Ours, in the place of the learned tokenizer of Chen et al. 2022. The centres are fitted once, on training images
    without random transforms, at the start of ``fit``, and stay in the checkpoint.

    Args:
        clusters: K, at least 2.
        images: Training images that the centres are fitted on, at most.

    Returns:
        ids [B,N] int64.

    Raises:
        ConfigError: ``clusters`` below 2, fewer different patches than clusters, or use before it is fitted.
    """

    gives_ids = True

    def __init__(self, clusters: int = 256, images: int = 2000) -> None:
        super().__init__()
        if clusters < 2 or images < 1:
            raise ConfigError(
                f"KMeansPatches needs clusters of at least 2 and images of at least 1, got {clusters} and {images}"
            )
        self.clusters, self.images = clusters, images
        self.pixels = PatchPixels(normalize=False)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A context autoencoder on digits with 16 clusters."""
        return tiny_run()

    def build(self, spec: Spec) -> None:
        """Make room for the centres."""
        super().build(spec)
        self.register_buffer("centres", torch.zeros(self.clusters, int(spec.code("patch_values", self))))
        self.register_buffer("fitted", torch.tensor(False))

    def size(self, spec: Spec) -> int:
        """K."""
        return self.clusters

    def callbacks(self) -> list[Callback]:
        """The one that fits it."""
        return [FitClusters(self)]

    def fit(self, patches: Tensor, seed: int = 0) -> None:
        """Find the centres of patches [M,F]; at most ``MOST`` of them, drawn by seed."""
        from sklearn.cluster import MiniBatchKMeans

        patches = patches.detach().float().cpu()
        different = len(patches[:MOST].unique(dim=0))
        if different < self.clusters:
            raise ConfigError(f"clusters={self.clusters} exceeds the {different} different patches: lower it")
        order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(seed))[:MOST]
        means = MiniBatchKMeans(self.clusters, n_init=3, batch_size=4096, random_state=seed % 2**32)
        means.fit(patches[order].numpy())
        self.centres.copy_(torch.from_numpy(means.cluster_centers_))  # type: ignore[operator]
        self.fitted.fill_(True)  # type: ignore[operator]
        self.__dict__["ready"] = True

    @torch.no_grad()
    def forward(self, batch: Batch, layout: Layout) -> Tensor:
        """[B,N]."""
        if not self.__dict__.get("ready"):  # asked once: reading a buffer would wait for a GPU
            if not bool(self.fitted):
                raise ConfigError("KMeansPatches has no centres yet: run fit, or load a checkpoint that did")
            self.__dict__["ready"] = True
        cells = self.pixels(batch, layout)
        return torch.cdist(cells, self.centres.expand(len(cells), -1, -1)).argmin(-1)  # type: ignore[operator]

    def paint(self, ids: Tensor) -> Tensor:
        """Ids [B,M] → patches [B,M,F]: what a prediction looks like."""
        return self.centres[ids]  # type: ignore[index]


class FitClusters(Callback):
    """Fits a ``KMeansPatches`` at the start of ``fit``, unless a checkpoint has done so.

    Args:
        target: What to fit.
    """

    def __init__(self, target: KMeansPatches) -> None:
        self.target = target

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """The first training images in a seeded order, as validation would see them."""
        if bool(self.target.fitted):
            return
        source, encoder = pl_module.datamodule, pl_module.find(TokenEncoder)
        if source is None:
            raise ConfigError("KMeansPatches is fitted on the training split of a data module: give data as one")
        data = source.dataset("train")
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(pl_module.seed))
        patches, generator = [], torch.Generator(pl_module.device).manual_seed(pl_module.seed)
        for places in order[: self.target.images].split(256):
            fetch = getattr(data, "__getitems__", None)
            batch = fetch(places.tolist()) if fetch else [data[i] for i in places.tolist()]
            batch = batch if isinstance(batch, dict) else source.collate(batch)
            batch = {k: v.to(pl_module.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            batch = source.transform(batch, generator, training=False)
            patches.append(self.target.pixels(batch, encoder.layout(batch)).flatten(0, 1).cpu())
        self.target.fit(torch.cat(patches), pl_module.seed)
