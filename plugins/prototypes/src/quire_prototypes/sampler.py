"""Explanations as predictions: for every sample its prototypes, what each one added, and a case to look up."""

from __future__ import annotations

from typing import Any

from quire.contracts import Batch, Sampler
from quire.errors import ConfigError
from quire.model import Model
from quire.roles.latent import VectorEncoder
from quire_prototypes.modules import AUTOENCODER, PrototypeLayer, check_finite, codes_of, layer_of
from quire_prototypes.training import scan, source_of


class ExplainByPrototypes(Sampler):
    """Label, prediction and the nearest prototypes with their contributions, one row a sample. Li et al. 2018.

    Args:
        top: Prototypes a row, nearest first; null gives all.

    Needs:
        encoder: VectorEncoder. decoder: PrototypeLayer.

    Returns:
        A dict a sample: ``index``, ``label`` (where the data has one), ``prediction``, ``logit`` of the prediction,
        ``prototypes`` (each with ``prototype``, ``distance`` squared, ``weight`` and ``contribution`` for the
        predicted class, ``class`` it votes for, ``nearest``: the training sample nearest to it, with ``index``,
        ``distance`` and ``label``; null outside a run with a data module) and ``rest``, the sum of the contributions
        not listed. Contributions and rest sum to the logit.

    Raises:
        ConfigError: ``top`` below 1.
        DataError: distances that are not finite.
    """

    encoder: VectorEncoder
    decoder: PrototypeLayer

    def __init__(self, top: int | None = 3) -> None:
        super().__init__()
        if top is not None and top < 1:
            raise ConfigError(f"ExplainByPrototypes.top must be at least 1, or null for all, got {top}")
        self.top = top

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Explain digits."""
        model = {**AUTOENCODER, "objective": "CaseBasedReasoning", "sampler": "ExplainByPrototypes"}
        return {"model": model, "data": "Digits"}

    def forward(self, model: Model, batch: Batch) -> list[dict[str, Any]]:
        """The rows of one batch."""
        layer = layer_of(model)
        why = layer.explain(codes_of(model, batch))
        check_finite(why.distance, batch.get("index"))
        cases = self._cases(model)
        top = min(self.top or layer.count, layer.count)
        shown = [t[:, :top].tolist() for t in (why.prototype, why.distance, why.weight, why.contribution, why.owner)]
        rest = why.contribution[:, top:].sum(1).tolist()
        logit = why.logits.gather(1, why.prediction[:, None])[:, 0].tolist()
        rows = []
        for i, prediction in enumerate(why.prediction.tolist()):
            row: dict[str, Any] = {k: int(batch[k][i]) for k in ("index", "label") if k in batch}
            row |= {"prediction": prediction, "logit": logit[i], "rest": rest[i]}
            row["prototypes"] = [
                {"prototype": p, "distance": d, "weight": w, "contribution": c, "class": k, "nearest": cases[p]}
                for p, d, w, c, k in zip(*(values[i] for values in shown))
            ]
            rows.append(row)
        return rows

    def _cases(self, model: Model) -> list[dict[str, Any] | None]:
        source = source_of(model)
        if source is None:
            return [None] * layer_of(model).count
        found = scan(model, source)
        cases: list[dict[str, Any] | None] = [
            {"index": i, "distance": d} for i, d in zip(found.nearest.tolist(), found.distance.tolist())
        ]
        for case, label in zip(cases, found.label.tolist() if found.label is not None else ()):
            case["label"] = label  # type: ignore[index]
        return cases
