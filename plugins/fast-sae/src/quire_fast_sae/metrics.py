"""Reconstruction error as the paper counts it: a mean over dialogues, and over their special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from quire.contracts import Batch, Losses, Metric
from quire.datasets.activations.forwards import rows_of
from quire.errors import ConfigError
from quire.roles.sparse.card import CardRow, Seen
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire_fast_sae.instances import tiny_feed
from quire_fast_sae.template import name_of


class ErrorMetric(Metric, CardRow):
    """What both metrics share: reading a batch, and rows for the card, which counts apart from the log."""

    log2: bool
    row: str
    full_state_update = False
    encoder: SparseEncoder
    decoder: SparseDecoder
    apart: Any

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """On dialogues."""
        return tiny_metric(cls.__name__)

    @property
    def label(self) -> str:
        """How the log calls it."""
        return type(self).__name__ + (".log2" if self.log2 else "")

    def see(self, errors: Tensor, rows: Batch) -> None:
        """Update from squared errors [N], each the mean over the width, and the fields of their tokens."""
        raise NotImplementedError

    def observe(self, model: Any, batch: Batch, losses: Losses) -> None:
        """Read a batch of rows, or of whole samples."""
        self.see(*token_errors(model, batch, losses))

    def card_begin(self) -> None:
        """Start anew."""
        self.refer("apart", type(self)(**self.init_args))

    def card_see(self, seen: Seen) -> Mapping[str, Tensor] | None:
        """Count a batch."""
        self.apart.see((seen.made - seen.x).square().mean(-1), seen.batch)
        return None

    def card_rows(self) -> Mapping[str, float]:
        """The number, with ``log2`` in its name where it is one."""
        return {f"{self.row}{'_log2' if self.log2 else ''}": float(self.apart.compute())}


class SequenceMSE(ErrorMetric):
    """Mean over dialogues of the mean squared error of their tokens. Li, Ye et al. 2025.

    A short dialogue counts as much as a long one, so it is no mean over tokens. The paper's tables hold log2.

    Args:
        log2: Give the logarithm to base 2, as the paper's tables do; the log then calls it ``SequenceMSE.log2``.

    Returns:
        Mean over dialogues of mean over tokens of mean over the width of the squared error, in squared units of the
        data, or its log2.

    Raises:
        ConfigError: an evaluation without a token.
    """

    fields = ("activation", "instance")
    row = "sequence_mse"
    errors: list[Tensor]
    counts: list[Tensor]
    instances: list[Tensor]

    def __init__(self, log2: bool = True) -> None:
        super().__init__()
        self.log2 = log2
        self.add_state("errors", [], dist_reduce_fx="cat")
        self.add_state("counts", [], dist_reduce_fx="cat")
        self.add_state("instances", [], dist_reduce_fx="cat")

    def update(self, errors: Tensor, instances: Tensor) -> None:
        """Squared errors [N], each the mean over the width, and the dialogues [N] they belong to."""
        number, place = instances.unique(return_inverse=True)
        sums = torch.zeros(len(number), dtype=torch.float64, device=errors.device).index_add_(0, place, errors.double())
        self.instances.append(number)
        self.errors.append(sums)
        self.counts.append(place.bincount(minlength=len(number)))

    def see(self, errors: Tensor, rows: Batch) -> None:
        """See ``update``."""
        self.update(errors, rows["instance"])

    def compute(self) -> Tensor:
        """The mean over dialogues."""
        if not len(self.errors):
            raise ConfigError("SequenceMSE has seen no token: the evaluation data is empty")
        number, place = dim_zero_cat(self.instances).unique(return_inverse=True)
        sums = torch.zeros(len(number), dtype=torch.float64, device=place.device)
        sums.index_add_(0, place, dim_zero_cat(self.errors))
        counts = torch.zeros_like(sums).index_add_(0, place, dim_zero_cat(self.counts).double())
        mean = (sums / counts).mean().float()
        return mean.log2() if self.log2 else mean


class SpecialTokenMSE(ErrorMetric):
    """The same over special tokens alone: the number of the paper's headline. Li, Ye et al. 2025.

    Special is what the data's field ``special`` says. The first token of a dialogue may have activations of another
    size and carry the mean, so the log also has the number without position 0, the median, and each type of token.

    Args:
        log2: Give logarithms to base 2, as the paper's tables do.
        by_type: Also log each type of special token, by its name.
        median: Also log the median over special tokens.

    Returns:
        Mean over dialogues of the mean over their special tokens of the squared error, averaged over the width.

    Raises:
        ConfigError: the data marks no token as special.
    """

    fields = ("activation", "special", "instance", "position")
    row = "special_mse"
    errors: list[Tensor]
    instances: list[Tensor]
    tokens: list[Tensor]
    positions: list[Tensor]

    def __init__(self, log2: bool = True, by_type: bool = True, median: bool = True) -> None:
        super().__init__()
        self.log2, self.by_type, self.median = log2, by_type, median
        for name in ("errors", "instances", "tokens", "positions"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self.table: dict[str, Tensor] = {}
        self.why = ""

    def callbacks(self) -> list[Callback]:
        """What logs the rest of the table."""
        return [LogTable()]

    def update(self, errors: Tensor, special: Tensor, instances: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """Squared errors [N], each the mean over the width, and what is known of the tokens [N]."""
        self.errors.append(errors[special].double())
        self.instances.append(instances[special])
        self.positions.append(positions[special])
        self.tokens.append(tokens[special])

    def observe(self, model: Any, batch: Batch, losses: Losses) -> None:
        """Read a batch of rows, or of whole samples."""
        given = getattr(model.datamodule, "special_ids", None)
        self.why = "data.special_ids is an empty list" if given == [] else "the data marks no token as special"
        super().observe(model, batch, losses)

    def see(self, errors: Tensor, rows: Batch) -> None:
        """See ``update``."""
        none = torch.full_like(rows["instance"], -1)
        self.update(errors, rows["special"], rows["instance"], rows["position"], rows.get("token", none))

    def card_rows(self) -> Mapping[str, float]:
        """The table; nothing where no token is special."""
        try:  # on every rank, since it gathers
            self.apart.compute()
        except ConfigError:
            return {}
        name = f"{self.row}{'_log2' if self.log2 else ''}"
        return {f"{name} {key}".strip(): float(value) for key, value in self.apart.table.items()}

    def compute(self) -> Tensor:
        """The mean; ``table`` then has everything else."""
        errors = dim_zero_cat(self.errors) if len(self.errors) else torch.zeros(0)
        if not len(errors):
            raise ConfigError(
                f"SpecialTokenMSE has no special ids: {self.why or 'the data marks no token as special'}; set"
                " data.special_ids to template or to ids"
            )
        instances = dim_zero_cat(self.instances)
        tokens, later = dim_zero_cat(self.tokens), dim_zero_cat(self.positions) > 0
        table = {"": by_dialogue(errors, instances)}
        if bool(later.any()):
            table["without position 0"] = by_dialogue(errors[later], instances[later])
        if self.median:
            table["median"] = errors.median()
        for token in tokens[tokens >= 0].unique().tolist() if self.by_type else ():
            table[f"token {token}"] = by_dialogue(errors[tokens == token], instances[tokens == token])
        self.table = {k: (v.log2() if self.log2 else v).float() for k, v in table.items()}
        return self.table[""]


class LogTable(Callback):
    """Log what ``SpecialTokenMSE`` knows beside its mean."""

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Under ``val/``."""
        self._log("val", pl_module)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Under ``test/``."""
        self._log("test", pl_module)

    def _log(self, stage: str, model: Any) -> None:
        for metric in model.metrics:
            if isinstance(metric, SpecialTokenMSE) and metric.update_called:
                metric.compute()
                for key, value in metric.table.items():
                    if key.startswith("token "):
                        key = name_of(model.tokenizer, int(key[6:]))
                    if key:
                        model.log(f"{stage}/{metric.label} {key}", value.to(model.device))


def by_dialogue(errors: Tensor, instances: Tensor) -> Tensor:
    """Mean over dialogues of the mean of their errors."""
    number, place = instances.unique(return_inverse=True)
    sums = errors.new_zeros(len(number)).index_add_(0, place, errors)
    return (sums / place.bincount(minlength=len(number))).mean()


def token_errors(model: Any, batch: Batch, losses: Losses) -> tuple[Tensor, Batch]:
    """Squared error of each token [N], the mean over the width in the data's units, and the batch as rows."""
    outputs, rows = losses.outputs, batch
    if batch["activation"].ndim == 3:
        outputs, rows = {}, dict(rows_of(batch))
    made, target = outputs.get("reconstruction"), outputs.get("target")
    if made is None or target is None:
        codes = outputs.get("codes")
        codes = model.encoder.role(SparseEncoder)(rows) if codes is None else codes
        made = model.decoder.role(SparseDecoder)(codes)
        target = rows.get("target", rows["activation"])
    return (made - target).square().mean(-1), rows


def tiny_metric(name: str) -> dict[str, Any]:
    """A small dictionary of dialogues with a metric."""
    run = tiny_feed("InstructActivations")
    run["model"]["metrics"] = [name]
    return run
