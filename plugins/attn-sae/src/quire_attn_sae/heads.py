"""Which head a latent belongs to, by its decoder row: heads lie side by side at a z site, so a row splits into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from quire.contracts import Batch, Losses, Metric, Spec
from quire.errors import ConfigError
from quire.roles.sparse.card import CardRow
from quire.roles.sparse.decoder import SparseDecoder
from quire_attn_sae.runs import tiny_run

NORMS = ("l1_of_l2", "squared")


def head_sizes(spec: Mapping[str, Any], asker: object) -> tuple[int, int]:
    """(H, d_h) of the z site that a dictionary was trained at.

    Raises:
        ConfigError: another kind of site, or a width that is not H times d_h.
    """
    name = asker if isinstance(asker, str) else type(asker).__name__
    site, heads, each = spec.get("site", "a site without a name"), spec.get("heads"), spec.get("head_width")
    if not heads or not each or str(site).endswith(".heads"):
        raise ConfigError(f"{name} needs a z site; trained at {site}: set data.site to blocks.N.z")
    width = int(spec.get("width") or 0)
    if width != heads * each:
        raise ConfigError(
            f"site {site} gives width {width}, but heads {heads} x head_width {each} = {heads * each}:"
            " correct model.spec, or leave it to the data"
        )
    return int(heads), int(each)


def head_shares(rows: Tensor, heads: int, norm: str = "l1_of_l2") -> Tensor:
    """[F,H] share of each head in each decoder row; rows sum to 1, a row of zeros stays 0.

    Args:
        rows: [F,H*d_h].
        heads: H.
        norm: ``"l1_of_l2"``: norms of the slices over their sum; ``"squared"``: their squares over the row's.
    """
    sizes = rows.float().unflatten(-1, (heads, -1)).norm(dim=-1)
    sizes = sizes.square() if norm == "squared" else sizes
    return sizes / sizes.sum(-1, keepdim=True).clamp(min=1e-30)


class HeadAttribution(Metric, CardRow):
    """How much of a latent lies in one attention head, by its decoder row. Kissane, Krzyzanowski et al. 2024.

    A latent's share of a head is the norm of its decoder row's slice there, over the sum of all slices' norms (arXiv
    2406.17759). Logged is the mean over latents of the largest share: 1 if each lives in one head, 1/H for rows spread
    evenly. A SparseCard gets it too, with each head's number of latents that lie mostly there.

    Args:
        norm: ``"l1_of_l2"``, as above; ``"squared"``: squared norms, which sum to 1 over a unit row.
        by_latent: In ``predict``, write every latent's shares [F,H] to metrics.json in place of the mean.

    Needs:
        decoder: SparseDecoder, trained at a z site.

    Returns:
        A share in [1/H, 1].

    Raises:
        ConfigError: an unknown norm, another site than z, or a width that is not H times d_h.
    """

    full_state_update = False
    decoder: SparseDecoder
    seen: Tensor
    of: Any

    def __init__(self, norm: Literal["l1_of_l2", "squared"] = "l1_of_l2", by_latent: bool = False) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ConfigError(f"HeadAttribution.norm must be {' or '.join(NORMS)}, got {norm!r}")
        self.norm, self.by_latent = norm, by_latent
        self.add_state("seen", torch.zeros(()), dist_reduce_fx="sum")
        self.whole = False
        self.refer("of", None)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A dictionary at the z site of a small language model with random weights."""
        return tiny_run(metrics=["HeadAttribution"])

    def build(self, spec: Spec) -> None:
        """Know the heads."""
        self.heads, self.head_width = head_sizes(spec, self)

    def bind(self, model: Any) -> None:
        """Know the decoder."""
        self.refer("of", model.decoder.role(SparseDecoder))

    def update(self) -> None:
        """Nothing to gather: the rows are there at the end."""
        self.seen += 1

    def observe(self, model: Any, batch: Batch, losses: Losses) -> None:
        """See ``update``."""
        self.whole = False
        self.update()

    def sampled(self, model: Any, batch: Batch, results: Any) -> None:
        """See ``update``."""
        self.whole = self.by_latent
        self.update()

    @torch.no_grad()
    def shares(self) -> Tensor:
        """[F,H] of the decoder as it is now."""
        return head_shares(self.of.W_dec, self.heads, self.norm)

    def compute(self) -> Tensor:
        """The mean largest share; [F,H] of all in ``predict`` with ``by_latent``."""
        shares = self.shares()
        return shares if self.whole else shares.amax(1).mean()

    def card_rows(self) -> dict[str, float]:
        """``head_share``, and ``head_N`` latents whose largest share is head N's."""
        shares = self.shares()
        counts = torch.bincount(shares.argmax(1), minlength=self.heads).tolist()
        return {"head_share": float(shares.amax(1).mean()), **{f"head_{h}": float(n) for h, n in enumerate(counts)}}
