"""The sampler of direct feature attribution: why did this latent fire here?"""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from torch import Tensor

from quire.contracts import Batch, Sampler, Spec
from quire.data import expand
from quire.errors import ConfigError
from quire.roles.sparse.encoder import SparseEncoder
from quire_attn_sae.dfa import Firings, entries, linear, strongest
from quire_attn_sae.heads import head_sizes
from quire_attn_sae.residual import value_parts
from quire_attn_sae.runs import tiny_run

BY = ("head", "source", "both")


class DirectFeatureAttribution(Sampler):
    """Which heads and source tokens made a latent fire, exactly. Kissane, Krzyzanowski et al. 2024.

    With the attention pattern A fixed, the pre-activation of latent i at token t is the sum over heads h and sources s
    of A[h,t,s] times value · encoder slice, and a constant (arXiv 2406.17759). Each latent is explained at the token of
    each sample where it is largest. Queries and keys, which made the pattern, are not explained.

    Args:
        latents: Ids, or how many of each sample's largest.
        by: ``"head"``: a number a head; ``"source"``: a number a source token; ``"both"``: [H,T].
        recursive: Also split the largest source's values, through the norm at its scale, into what wrote to the
            residual stream there and ``bias``; a path to a Quire checkpoint of a dictionary of that residual stream
            splits into its latents.

    Needs:
        encoder: SparseEncoder, trained at blocks.N.z. data: Activations with analysis: true.

    Returns:
        A row a sample: ``index`` and ``latents``, a list of ``latent``, ``position``, ``activation``, ``pre``
        (pre-activation), ``constant``, ``by_head`` [H], ``by_source`` [T] (their sums plus ``constant`` are ``pre``),
        ``both`` [H,T], ``source`` (the largest), ``token`` and ``source_token`` where there is text, and
        ``recursive``: parts of the largest source by name.

    Raises:
        ConfigError: no patterns, another site, an unknown ``by``, or a latent that is not there.
    """

    encoder: SparseEncoder
    fields = ("activation",)
    model: Any
    dictionary: Any

    def __init__(
        self,
        latents: list[int] | int = 4,
        by: Literal["head", "source", "both"] = "source",
        recursive: bool | str = False,
    ) -> None:
        super().__init__()
        if by not in BY:
            raise ConfigError(f"DirectFeatureAttribution.by must be {', '.join(BY)}, got {by!r}")
        if latents == [] or (isinstance(latents, int) and latents < 1):
            raise ConfigError(f"DirectFeatureAttribution.latents must name latents or be at least 1, got {latents}")
        self.latents, self.by, self.recursive = latents, by, recursive
        self.refer("dictionary", None)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A dictionary at the z site of a small language model with random weights, two latents a sample."""
        sampler = {"class_path": "DirectFeatureAttribution", "init_args": {"latents": 2, "by": "both"}}
        return tiny_run(analysis=True, sampler=sampler)

    def build(self, spec: Spec) -> None:
        """Know the heads and the block."""
        self.heads, self.head_width = head_sizes(spec, self)
        found = re.fullmatch(r"blocks\.(\d+)\.z", str(spec.get("site")))
        self.block = int(found[1]) if found else -1
        if isinstance(self.recursive, str):
            from quire.checkpoint import load

            self.refer("dictionary", load(expand(self.recursive)).eval())

    @torch.no_grad()
    def forward(self, model: Any, batch: Batch) -> list[dict[str, Any]]:
        """Explain one batch of whole samples."""
        if "pattern" not in batch or "value" not in batch:
            raise ConfigError(
                "DirectFeatureAttribution needs 'pattern' and 'value': set data.analysis: true (eager attention)"
            )
        encoder = model.encoder.role(SparseEncoder)
        activation, mask = batch["activation"], batch["mask"]
        codes = encoder(batch).dense()
        at = strongest(codes, mask, self.latents)
        line = linear(encoder, activation, at)
        terms = entries(batch["pattern"], batch["value"], line.directions, at)  # [M,H,S]
        deeper = self._deeper(model, batch, line.directions, at, terms) if self.recursive else [{}] * len(at)
        rows: list[dict[str, Any]] = [{"index": int(i), "latents": []} for i in batch["index"]]
        for m in range(len(at)):
            rows[int(at.rows[m])]["latents"].append(
                self._row(batch, codes, at, m, terms[m], float(line.constant[m])) | deeper[m]
            )
        return rows

    def _row(self, batch: Batch, codes: Tensor, at: Firings, m: int, terms: Tensor, constant: float) -> dict[str, Any]:
        row, place, latent = int(at.rows[m]), int(at.places[m]), int(at.latents[m])
        source = int(terms.sum(0).argmax())
        said: dict[str, Any] = {"latent": latent, "position": place, "activation": float(codes[row, place, latent])}
        said |= {"pre": float(terms.sum()) + constant, "constant": constant, "source": source}
        if "tokens" in batch and batch["tokens"].shape == batch["mask"].shape:
            said |= {"token": int(batch["tokens"][row, place]), "source_token": int(batch["tokens"][row, source])}
        if self.by == "head":
            said["by_head"] = terms.sum(1).tolist()
        elif self.by == "source":
            said["by_source"] = terms.sum(0).tolist()
        else:
            said |= {"both": terms.tolist(), "by_head": terms.sum(1).tolist(), "by_source": terms.sum(0).tolist()}
        return said

    def _deeper(
        self, model: Any, batch: Batch, directions: Tensor, at: Firings, terms: Tensor
    ) -> list[dict[str, dict[str, float]]]:
        subject = model.subject
        if subject is None or self.block < 0:
            raise ConfigError("recursive: true needs the subject itself at blocks.N.z: give data as Activations")
        parts = value_parts(subject, self.block, batch, batch["value"], self.heads, self.dictionary)
        largest = terms.sum(1).argmax(1)  # [M]
        own = torch.arange(len(at), device=largest.device)
        split = {k: entries(batch["pattern"], v, directions, at).sum(1)[own, largest] for k, v in parts.items()}
        return [{"recursive": {k: float(v[m]) for k, v in split.items()}} for m in range(len(at))]
