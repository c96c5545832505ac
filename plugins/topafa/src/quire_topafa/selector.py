"""Keep as many latents as bring the code's norm nearest to the input's."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from quire.contracts import Spec, build
from quire.errors import ConfigError, DataError
from quire.roles.sparse.codes import SparseCodes
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.selector import Selection, Selector, gathered, ranking, tiny_run
from quire_topafa.prefix import DOMAINS, OFFICIAL_SENTINEL, prefixes


class TopAFA(Selector):
    """Keep a token's largest latents until their norm is nearest to the input's; no k to choose. Lee et al. 2025.

    Where the decoder's rows are nearly orthogonal, the norm of a code that rebuilds x is near that of x (arXiv
    2503.24277). Latents come in falling order of z |d|, and each token keeps the first k that bring the norm of its
    z |d| nearest to that of x~ - b_dec. After a layer norm every token has the same norm, so that k then varies by
    b_dec and angles only: ``norm: global_rms`` keeps what norms say.

    Args:
        domain: ``"norm"`` compares norms, as the official code; ``"squared"`` their squares, which can keep fewer.
        scale_by_decoder: Multiply z by the norm of its decoder row first.
        k_max: Most latents of a token; null is no limit.
        order: Another selector that ranks latents (TopK, GradTopK); it orders, this one cuts.
        compat: ``"official"`` takes 1e4 for the norm of all latents, as the official code; else infinity.

    Needs:
        encoder: SparseEncoder. decoder: SparseDecoder.

    Returns:
        Codes [N,K], K the most that one token of the batch keeps.

    Raises:
        ConfigError: an unknown domain or compat, k_max below 1 or above the latents, or an order without ranking.
        DataError: a decoder row of zeros.
    """

    needs_ranking = True

    def __init__(
        self,
        domain: Literal["norm", "squared"] = "norm",
        scale_by_decoder: bool = True,
        k_max: int | None = None,
        order: Selector | None = None,
        compat: Literal["official"] | None = None,
    ) -> None:
        super().__init__()
        if domain not in DOMAINS:
            raise ConfigError(f"TopAFA.domain must be norm or squared, got {domain!r}")
        if k_max is not None and k_max < 1:
            raise ConfigError(f"TopAFA.k_max must be at least 1, got {k_max}")
        self.domain, self.scale_by_decoder, self.k_max = domain, scale_by_decoder, k_max
        self.order = None if order is None else ranking(order, "TopAFA")
        self.compat = check_compat(compat, "TopAFA")

    def build(self, spec: Spec) -> None:
        """Check k_max against the latents."""
        latents = int(spec.need("latents", self))
        if self.k_max is not None and self.k_max > latents:
            raise ConfigError(f"k_max ({self.k_max}) exceeds latents ({latents})")
        if self.order is not None:
            build(self.order, spec)

    def select(self, z: Tensor, context: Selection) -> SparseCodes:
        """The first k latents of each row, k its own; has the graph of ``z`` at those."""
        with torch.no_grad():
            values = z.detach()
            wide = torch.promote_types(values.dtype, torch.float32)
            sizes = values.to(wide)
            if self.scale_by_decoder:
                norms = context.rows.to(wide).norm(dim=1)
                if not norms.is_cuda:
                    check_rows(norms)
                sizes = sizes * norms
            scores = sizes if self.order is None else self.order.scores(values, context)
            last = OFFICIAL_SENTINEL if self.compat else torch.inf
            target = inputs(context).to(wide).norm(dim=1)
            indices, counts = prefixes(scores, sizes.square(), target, self.domain, self.k_max, last)
            kept = torch.arange(indices.shape[1], device=z.device) < counts[:, None]
        codes = gathered(z, indices)
        return codes.replace(values=codes.values * kept)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Planted features."""
        return tiny_run(cls.__name__)


def inputs(context: Selection) -> Tensor:
    """[N,D] x~ - b_dec, whether or not the encoder subtracts it."""
    model = context.model
    if model is None or model.decoder is None or model.encoder is None:
        return context.u
    encoder, decoder = model.encoder.role(SparseEncoder), model.decoder.role(SparseDecoder)
    if encoder is None or decoder is None or encoder.b_dec is not None or decoder.b_dec is None:
        return context.u
    return context.u - decoder.b_dec.detach() if decoder.width == context.u.shape[1] else context.u


def check_rows(norms: Tensor) -> None:
    """Raise ``DataError`` naming the first decoder row of norm 0."""
    empty = (norms == 0).nonzero()
    if len(empty):
        raise DataError(f"decoder row {int(empty[0])} has zero norm: a latent without a direction can't be scaled")


def check_compat(compat: str | None, asker: str) -> str | None:
    """``compat`` if there is such a one. Raises ``ConfigError``."""
    if compat not in (None, "official"):
        raise ConfigError(f"{asker}.compat must be official or null, got {compat!r}")
    return compat
