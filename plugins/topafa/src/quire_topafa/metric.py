"""eps_LBO as a metric of validation and as rows of the card."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from quire.contracts import Batch, Losses, Metric, Spec
from quire.errors import ConfigError
from quire.roles.sparse.card import CardRow, Seen, as_codes
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.ranks import ranks
from quire.roles.sparse.selector import tiny_run
from quire_topafa.norms import eps_lbo, norms

log = logging.getLogger(__name__)

QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}
TYPES = ("content", "first", "special")


class EpsLBO(Metric, CardRow):
    """How far a dictionary's codes are from what quasi-orthogonal rows would need; needs no labels. Lee et al. 2025.

    eps_LBO = | |x|² - |f~|² | / ((h-1) |f~|²), a lower bound on any overlap of rows that could make the code consistent
    (arXiv 2503.24277). f~ are the latents times their rows' norms, with the bias as one latent more that is always on;
    h stays the number of latents. Any selector, one's own dictionary or a loaded one. The card gets ``eps_lbo`` and its
    quantiles.

    Args:
        tokens: ``"all"`` that are not special, or ``"last"``, one of each row, as the official code.
        by_token_type: Also apart for content, first and special tokens, on the card and in ``by_type``.
        report: What is logged: ``median``, ``mean``, ``q05``, ``q25``, ``q75`` or ``q95``.

    Needs:
        encoder: SparseEncoder. decoder: SparseDecoder. Field ``instance`` for ``last``.

    Returns:
        A number from 0; NaN before any token. Tokens without an active latent are infinite: counted, and left out.

    Raises:
        ConfigError: an unknown option, or fewer than 2 latents.
        DataError: a decoder row of zeros.
    """

    full_state_update = False
    encoder: SparseEncoder
    decoder: SparseDecoder
    values: list[Tensor]
    kinds: list[Tensor]

    def __init__(
        self,
        tokens: Literal["all", "last"] = "all",
        by_token_type: bool = False,
        report: Literal["median", "mean", "q05", "q25", "q75", "q95"] = "median",
    ) -> None:
        super().__init__()
        if tokens not in ("all", "last"):
            raise ConfigError(f"EpsLBO.tokens must be all or last, got {tokens!r}")
        if report != "mean" and report not in QUANTILES:
            raise ConfigError(f"EpsLBO.report must be mean or one of {', '.join(QUANTILES)}, got {report!r}")
        self.tokens, self.by_token_type, self.report = tokens, by_token_type, report
        self.add_state("values", [], dist_reduce_fx="cat")
        self.add_state("kinds", [], dist_reduce_fx="cat")
        self._held: dict[str, tuple[int, Tensor, Tensor]] = {}
        self._card: list[tuple[Tensor, Tensor]] = []
        self._warned = False

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Planted features, TopK with k = 2."""
        run = tiny_run({"class_path": "TopK", "init_args": {"k": 2}})
        run["model"]["metrics"] = [cls.__name__]
        return run

    def build(self, spec: Spec) -> None:
        """Check the number of latents."""
        if int(spec.code("latents", self)) < 2:
            raise ConfigError(f"EpsLBO needs at least 2 latents, got {spec.code('latents', self)}")

    def reads(self, stage: str) -> tuple[str, ...]:
        """``instance`` where the last token of each row is looked at."""
        return ("activation", "instance") if self.tokens == "last" and stage != "predict" else ("activation",)

    # ---- metric
    def update(self, values: Tensor, kinds: Tensor | None = None) -> None:
        """Add values [N], of token types [N]: 0 content, 1 first, 2 special."""
        self.values.append(values)
        self.kinds.append(torch.zeros_like(values, dtype=torch.long) if kinds is None else kinds)

    def observe(self, model: Any, batch: Batch, losses: Losses) -> None:
        """Read one batch; the objective's codes where it gives them."""
        codes = losses.outputs.get("codes")
        codes = model.encoder.role(SparseEncoder)(batch) if codes is None else codes
        self.update(*self._chosen("metric", batch, *self.of(batch, codes, model.decoder.role(SparseDecoder))))

    def compute(self) -> Tensor:
        """What ``report`` says, over finite values."""
        found = self.summary()
        return torch.tensor(found[self.report], device=self.device)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._held.pop("metric", None)

    def summary(self) -> dict[str, float]:
        """mean, quantiles, and how many tokens were infinite."""
        return self._said(*self._all("metric", self.values, self.kinds))

    def by_type(self) -> dict[str, dict[str, float]]:
        """``summary`` of content, first and special tokens."""
        values, kinds = self._all("metric", self.values, self.kinds)
        return {name: _numbers(values[kinds == i]) for i, name in enumerate(TYPES) if bool((kinds == i).any())}

    # ---- card
    def card_begin(self) -> None:
        """Forget an earlier card."""
        self._card = []
        self._held.pop("card", None)

    def card_see(self, seen: Seen) -> Mapping[str, Tensor] | None:
        """Keep a batch's values."""
        found = self._chosen("card", seen.batch, *self.of(seen.batch, seen.codes, seen.decoder))
        self._card.append((found[0].cpu(), found[1].cpu()))
        return None

    def card_rows(self) -> Mapping[str, float]:
        """``eps_lbo`` is the mean, the quantiles behind it; with ``by_token_type`` medians by type."""
        values, kinds = self._all("card", [v for v, _ in self._card], [k for _, k in self._card])
        if ranks() > 1:
            everyone: list[Any] = [None] * ranks()
            torch.distributed.all_gather_object(everyone, (values, kinds))
            values, kinds = (torch.cat([pair[i] for pair in everyone]) for i in range(2))
        said = self._said(values, kinds)
        rows = {"eps_lbo": said["mean"], **{f"eps_lbo_{n}": said[n] for n in (*QUANTILES, "infinite")}}
        if self.by_token_type:
            for i, name in enumerate(TYPES):
                if bool((kinds == i).any()):
                    rows[f"eps_lbo_{name}"] = _numbers(values[kinds == i])["median"]
        return rows

    # ---- values
    def of(self, batch: Batch, codes: Any, decoder: Any) -> tuple[Tensor, Tensor]:
        """(eps_LBO [N], token types [N]) of every token of a batch; padding has type -1."""
        values = eps_lbo(*norms(batch, codes, decoder), as_codes(codes).latents)
        kinds = torch.zeros(len(values), dtype=torch.long, device=values.device)
        for name, number in (("position", 1), ("special", 2)):
            if isinstance(batch.get(name), Tensor):
                field = batch[name].reshape(-1).to(kinds.device)
                kinds = torch.where(field == 0 if name == "position" else field.bool(), number, kinds)
        if isinstance(batch.get("mask"), Tensor) and batch["activation"].ndim == 3:
            kinds = torch.where(batch["mask"].reshape(-1), kinds, -1)
        return values, kinds

    def _chosen(self, where: str, batch: Batch, values: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that count: all that aren't special, or the last of each row."""
        if self.tokens == "all":
            counts = kinds >= 0 if self.by_token_type else (kinds == 0) | (kinds == 1)
            return values[counts], kinds[counts]
        instance = batch["instance"] if "instance" in batch else batch["index"][:, None].expand(batch["mask"].shape)
        instance = instance.reshape(-1).to(values.device)
        values, kinds, instance = values[kinds >= 0], kinds[kinds >= 0], instance[kinds >= 0]
        if not len(values):
            return values, kinds
        ends = torch.ones_like(instance, dtype=torch.bool)
        ends[:-1] = instance[1:] != instance[:-1]
        ends[-1] = False  # the next batch may go on with it
        done, types = values[ends], kinds[ends]
        held = self._held.get(where)
        if held is not None and held[0] != int(instance[0]):
            done, types = torch.cat([held[1], done]), torch.cat([held[2], types])
        self._held[where] = int(instance[-1]), values[-1:], kinds[-1:]
        return done, types

    def _all(self, where: str, values: Any, kinds: Any) -> tuple[Tensor, Tensor]:
        parts = [values] if isinstance(values, Tensor) else list(values)
        types = [kinds] if isinstance(kinds, Tensor) else list(kinds)
        if where in self._held:
            parts, types = [*parts, self._held[where][1]], [*types, self._held[where][2]]
        if not parts:
            return torch.zeros(0), torch.zeros(0, dtype=torch.long)
        return torch.cat(parts), torch.cat(types)

    def _said(self, values: Tensor, kinds: Tensor) -> dict[str, float]:
        if self.by_token_type and self.tokens == "all":
            values = values[kinds != 2]
        found = _numbers(values)
        if found["infinite"] and not self._warned:
            self._warned = True
            log.warning("EpsLBO: %d tokens have no active latent: infinite, and left out", int(found["infinite"]))
        return found


def _numbers(values: Tensor) -> dict[str, float]:
    finite = values[torch.isfinite(values)].double().sort().values
    if not len(finite):
        return {"mean": float("nan"), **dict.fromkeys(QUANTILES, float("nan")), "infinite": float(len(values))}
    places = {n: finite[round(q * (len(finite) - 1))] for n, q in QUANTILES.items()}
    said = {"mean": float(finite.mean()), **{n: float(v) for n, v in places.items()}}
    return {**said, "infinite": float(len(values) - len(finite))}
