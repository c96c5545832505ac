"""Trained with or without gradients, selected with or without: the table that parts what training did from selection.

Selecting by gradient in evaluation reads the labels that the subject is asked to predict. A dictionary that only looks
better there has not become better by training (Olmo et al. 2024 leave open which of the two they print).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from quire.contracts import Spec, build
from quire.errors import ConfigError
from quire.matching import refusal
from quire.roles.probes.subject import QUICK, Subject
from quire.roles.probes.watch import Watch
from quire.roles.sparse.card import Card, measure
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.selectors import BatchTopK, TopK
from quire_gsae.selectors import EVALUATIONS, GradBatchTopK, GradientOrder, GradTopK, tiny_gradient_run

PLAIN, GRAD = EVALUATIONS
SHOWN = ("delta_ce", "fvu", "l0", "dead")
SENTENCE = (
    "the cells off the diagonal separate training from selection: down a column is what training with gradients did,"
    " along a row what choosing with the labels does"
)


@contextmanager
def selecting(encoder: SparseEncoder, how: str, beta: float = 1.0) -> Iterator[None]:
    """Within the block the encoder selects plainly, or by gradient, whatever it was trained with.

    Args:
        encoder: With TopK, BatchTopK or their gradient forms.
        how: ``plain`` or ``grad``.
        beta: Of a selector that has none.

    Raises:
        ConfigError: another selector.
    """
    was: Any = encoder.selector
    if isinstance(was, GradientOrder):
        before, was.select_at_eval = was.select_at_eval, how
        try:
            yield
        finally:
            was.select_at_eval = before
        return
    kinds: dict[type, Any] = {TopK: GradTopK, BatchTopK: GradBatchTopK}
    if type(was) not in kinds:
        raise ConfigError(f"{type(was).__name__} has no gradient form: use TopK, BatchTopK, GradTopK or GradBatchTopK")
    if how == PLAIN:
        yield
        return
    other = kinds[type(was)](was.k, beta=beta, select_at_eval=GRAD)
    known: Any = encoder.built_with
    build(other, Spec({**known, "latents": encoder.latents}))
    encoder.selector = other.to(encoder.W_enc.device)
    try:
        yield
    finally:
        encoder.selector = was


def both(encoder: SparseEncoder, decoder: Any, feed: Any, beta: float = 1.0, **given: Any) -> dict[str, Card]:
    """The card under both selections, ``plain`` and ``grad``, on the same tokens; ``given`` goes to ``measure``."""
    found = {}
    for how in EVALUATIONS:
        with selecting(encoder, how, beta):
            found[how] = measure(encoder, decoder, feed, **given)
    return found


def trained_with(encoder: SparseEncoder) -> str:
    """``GradTopK beta 1``, or the plain selector's name."""
    selector: Any = encoder.selector
    name = type(selector).__name__
    return f"{name} beta {selector.beta:g}" if isinstance(selector, GradientOrder) else name


def table_text(rows: Mapping[str, Mapping[str, Card]]) -> str:
    """Markdown: trained with x selected with, each cell the added loss, with FVU, L0 and dead share.

    Args:
        rows: By what it was trained with, then by what it is selected with.
    """
    lines = ["| trained with | selected plain | selected by gradient |", "| --- | --- | --- |"]
    for name, cells in rows.items():
        lines.append(f"| {name} | {_cell(cells[PLAIN])} | {_cell(cells[GRAD])} |")
    return "\n".join([*lines, "", SENTENCE])


def _cell(card: Card) -> str:
    said = [(n, card.get(n)) for n in SHOWN]
    return ", ".join(f"{n} {v:.4g}" for n, v in said if not math.isnan(v))


class SelectionTable(Watch):
    """Judge a dictionary with plain and with gradient selection, both on the same tokens. Olmo et al. 2024.

    Prints trained with x selected with, and writes it as ``selection.md`` and the cards as ``selection-….json``. A
    dictionary trained with the other selector may stand beside it, for the whole table of two by two.

    Args:
        against: Quire checkpoint of that dictionary; null leaves it out.
        beta: Weight of the gradient where a dictionary was trained without.
        tokens: Evaluated tokens, of all processes together.
        splice: Also run the subject with the rebuild at the site.
        every: Epochs between two tables; 0 is only at the end of ``fit``, in ``validate`` and ``test``.

    Needs:
        encoder: SparseEncoder with TopK, BatchTopK, GradTopK or GradBatchTopK. decoder: SparseDecoder. Field ``grad``.

    Raises:
        ConfigError: ``tokens`` below 1, another selector, or data without ``grad``.
    """

    encoder: SparseEncoder
    decoder: SparseDecoder
    fields = ("grad",)

    def __init__(
        self,
        against: str | None = None,
        beta: float = 1.0,
        tokens: int = 20_000,
        splice: bool = True,
        every: int = 0,
    ) -> None:
        super().__init__("selection", every)
        if tokens < 1:
            raise ConfigError(f"SelectionTable.tokens must be at least 1, got {tokens}")
        self.against, self.beta, self.tokens, self.splice = against, beta, tokens, splice
        self.rows: dict[str, dict[str, Card]] = {}

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A gradient dictionary of a small language model with random weights."""
        run = tiny_gradient_run({"class_path": "GradTopK", "init_args": {"k": 2}})
        return {**run, "trainer": {"callbacks": [{"class_path": cls.__name__, "init_args": {"tokens": 256}}]}}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a model, or data, that can't be judged both ways."""
        if stage == "predict":
            return
        offered = tuple(getattr(trainer.datamodule, "fields", ()))  # type: ignore[attr-defined]
        if offered and "grad" not in offered:
            raise ConfigError("SelectionTable selects by gradient too: set data.with_grad: true")
        super().setup(trainer, pl_module, stage)
        if said := refusal(type(self), "decoder", pl_module.decoder):  # type: ignore[arg-type]
            raise ConfigError(said)
        selector = pl_module.encoder.role(SparseEncoder).selector  # type: ignore[union-attr, operator]
        if not isinstance(selector, GradientOrder) and type(selector) not in (TopK, BatchTopK):
            raise ConfigError(
                f"SelectionTable judges TopK, BatchTopK, GradTopK and GradBatchTopK; the selector is"
                f" {type(selector).__name__}"
            )

    def measure(self, subject: Subject, split: str, epoch: int = 0, step: int = 0) -> dict[str, float]:
        """The cards of both selections."""
        models = [subject.model]
        if self.against is not None:
            from quire.checkpoint import load

            models.append(load(self.against).to(subject.device))
        self.rows = {}
        for model in models:
            encoder, decoder = model.encoder.role(SparseEncoder), model.decoder.role(SparseDecoder)
            name = trained_with(encoder)
            name = f"{name} ({Path(str(self.against)).stem})" if name in self.rows else name
            with subject.scope():
                tokens = min(self.tokens, QUICK) if subject.quick else self.tokens
                given = {"tokens": tokens, "splice": self.splice, "split": split, "name": name}
                self.rows[name] = both(encoder, decoder, subject.source, self.beta, **given)
        own = next(iter(self.rows.values()))
        return {f"/{how}/{n}": v for how, card in own.items() for n in SHOWN if not math.isnan(v := card.get(n))}

    def show(self, folder: Path) -> str:
        """Write table and cards; the table."""
        folder.mkdir(parents=True, exist_ok=True)
        for place, cells in enumerate(self.rows.values()):
            for how, card in cells.items():
                card.write(folder, f"selection-{place}-{how}")
        said = table_text(self.rows)
        (folder / "selection.md").write_text(said + "\n", encoding="utf-8")
        return said
