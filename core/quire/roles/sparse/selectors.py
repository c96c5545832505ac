"""Selectors of the core: ReLU, TopK, BatchTopK, Matryoshka."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from quire.contracts import Spec, build
from quire.errors import ConfigError
from quire.roles.sparse.codes import SparseCodes, packed
from quire.roles.sparse.ranks import ranks, sum_over_ranks
from quire.roles.sparse.selector import Selection, Selector, check_fits, check_kept, gathered, largest, tiny_run


class ReLU(Selector):
    """Keep every latent above 0; sparsity comes from an l1 term.

    Returns:
        Dense codes [N,F].
    """

    exports = "relu"

    def select(self, z: Tensor, context: Selection) -> SparseCodes:
        """All of ``z``."""
        return SparseCodes(z, None, z.shape[1])

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """With an l1 term."""
        return tiny_run("ReLU", {"class_path": "SparseReconstruction", "init_args": {"l1": 0.01}})


class TopK(Selector):
    """Keep each token's k largest latents. Gao et al. 2024, arXiv 2406.04093.

    Args:
        k: Latents kept per token.

    Returns:
        Codes with K = k; a kept 0 is not active.

    Raises:
        ConfigError: k below 1, or above the number of latents.
    """

    ranks = True
    exports = "topk"

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = check_kept(k, self)

    @property
    def keeps(self) -> int | None:
        """k."""
        return self.k

    def build(self, spec: Spec) -> None:
        """Check k against the latents."""
        check_fits(self.k, int(spec.need("latents", self)))

    def select(self, z: Tensor, context: Selection) -> SparseCodes:
        """The k highest ``scores`` of each row, with their values of ``z``."""
        return gathered(z, largest(self.scores(z, context), self.k))

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """k = 2."""
        return tiny_run({"class_path": cls.__name__, "init_args": {"k": 2}})


class BatchTopK(Selector):
    """Keep the batch's k * N largest latents, so that tokens differ in number. Bussmann et al. 2024, arXiv 2412.06410.

    In evaluation a token is cut at a fixed threshold: the running mean (decay 0.999) of the smallest kept value of the
    training batches, so that its codes don't depend on its batch. Each process selects among its own tokens.

    Args:
        k: Latents kept per token, on average.

    Returns:
        Codes with K the most that one token of the batch has.

    Raises:
        ConfigError: k below 1, or above the number of latents.
    """

    ranks = True
    exports = "batchtopk"
    decay = 0.999
    threshold: Tensor

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = check_kept(k, self)
        self.register_buffer("threshold", torch.full((), -1.0))  # -1: no training batch yet

    @property
    def keeps(self) -> int | None:
        """k."""
        return self.k

    def build(self, spec: Spec) -> None:
        """Check k against the latents."""
        check_fits(self.k, int(spec.need("latents", self)))

    def select(self, z: Tensor, context: Selection) -> SparseCodes:
        """The highest ``scores`` of the whole batch, or in evaluation all ``z`` above the threshold."""
        with torch.no_grad():
            values = z.detach()
            if context.training or self.threshold < 0:
                scores = self.scores(values, context) * (values > 0)
                cut = scores.flatten().topk(self.k * len(z), sorted=False).values.min()
                kept = (scores >= cut) & (values > 0)
            else:
                kept = values > self.threshold
            if context.training:
                self._learn(values, kept)
            indices = packed(values * kept).indices
            assert indices is not None
            kept = kept.gather(1, indices)
        codes = gathered(z, indices)
        return codes.replace(values=codes.values * kept)

    def _learn(self, values: Tensor, kept: Tensor) -> None:
        least = torch.where(kept, values, torch.inf).min().to(self.threshold)
        least = sum_over_ranks(torch.where(least.isfinite(), least, 0.0)) / ranks()
        mixed = self.decay * self.threshold + (1 - self.decay) * least
        self.threshold.copy_(torch.where(self.threshold < 0, least, mixed))

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """k = 2."""
        return tiny_run({"class_path": cls.__name__, "init_args": {"k": 2}})


class Matryoshka(Selector):
    """Apply a selector to growing prefixes of the latents, so early ones serve alone. Bussmann et al. 2025.

    The last selection sees all latents and is what others use; the shorter ones are ``codes.nested``, each of which
    SparseReconstruction rebuilds the input from as well (arXiv 2503.17547).

    Args:
        selector: What each prefix is selected by; each has one of its own.
        prefixes: Numbers of latents, rising; all of them together are added as the last.

    Returns:
        Codes of all latents, with ``nested`` of the shorter prefixes.

    Raises:
        ConfigError: no prefixes, or prefixes that don't rise or that exceed the latents.
    """

    def __init__(self, selector: Selector, prefixes: list[int]) -> None:
        super().__init__()
        if not prefixes or min(prefixes) < 1 or sorted(set(prefixes)) != list(prefixes):
            raise ConfigError(f"Matryoshka.prefixes must be rising numbers of latents, got {prefixes}")
        self.prefixes = list(prefixes)
        self.inner = selector
        self.ranks = selector.ranks  # type: ignore[misc]
        self.counts = selector.counts  # type: ignore[misc]
        self.needs_pre = selector.needs_pre  # type: ignore[misc]
        self.exports = selector.exports  # type: ignore[misc]

    @property
    def keeps(self) -> int | None:
        """As the inner selector's."""
        return self.inner.keeps

    def build(self, spec: Spec) -> None:
        """One selector a prefix."""
        latents = int(spec.need("latents", self))
        if self.prefixes[-1] > latents:
            raise ConfigError(f"Matryoshka's prefix {self.prefixes[-1]} exceeds latents ({latents})")
        self.lengths = [p for p in self.prefixes if p < latents]
        self.shorter = nn.ModuleList(copy.deepcopy(self.inner) for _ in self.lengths)
        for length, selector in zip(self.lengths, self.shorter):
            assert isinstance(selector, Selector)
            build(selector, Spec({**spec, "latents": length}))
        build(self.inner, spec)

    def scores(self, z: Tensor, context: Selection) -> Tensor:
        """Those of the selector of all latents."""
        return self.inner.scores(z, context)

    def select(self, z: Tensor, context: Selection) -> SparseCodes:
        """All latents, and each prefix for itself."""
        nested = []
        for length, selector in zip(self.lengths, self.shorter):
            assert isinstance(selector, Selector)
            few = selector.select(z[:, :length], context.prefix(length))
            if few.indices is None:
                few = few.replace(values=nn.functional.pad(few.values, (0, z.shape[1] - length)))
            nested.append(few.replace(latents=z.shape[1]))
        return self.inner.select(z, context).replace(nested=tuple(nested))

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """TopK on the first 8 latents and on all."""
        inner = {"class_path": "TopK", "init_args": {"k": 2}}
        return tiny_run({"class_path": "Matryoshka", "init_args": {"selector": inner, "prefixes": [8]}})
