"""The callback that makes a run's card."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from quire.data import DataModule
from quire.errors import ConfigError
from quire.matching import refusal
from quire.roles.probes.subject import QUICK, Subject
from quire.roles.probes.watch import Watch
from quire.roles.sparse.bank import DictionaryBank
from quire.roles.sparse.card import Card, CardRow, measure, pareto
from quire.roles.sparse.dead import DeadLatents
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.result import shown


class SparseCard(Watch):
    """The metric card of a sparse dictionary: how sparse, how faithful, and what the subject loses with it in between.

    Logged after ``val/card/``, and written as ``card.json``, ``card.md`` and the density histogram ``card.png`` into
    the run's folder. FVU's baseline is the mean of the evaluated tokens, over the whole set. Metrics and other parts
    of the model that are a ``CardRow`` add their rows. A DictionaryBank gets a card a member, ``card-0.json``…, its
    numbers after ``val/card/0.``, and the members' loss against their L0 as ``pareto.png``.

    Args:
        splice: Also run the subject with the rebuild, zeros and the mean at the site.
        tokens: Evaluated tokens, of all processes together.
        every: Epochs between two cards; 0 is only at the end of ``fit``, in ``validate`` and ``test``.
        name: Of the arm, for plots; by default the selector's.
        label: Name in the log and of the files.

    Needs:
        encoder: SparseEncoder. decoder: SparseDecoder. (Or a DictionaryBank.) Splices need data with a subject, such as
        Activations.

    Raises:
        ConfigError: ``tokens`` below 1, or no sparse encoder and decoder.
    """

    encoder: SparseEncoder
    decoder: SparseDecoder

    def __init__(
        self, splice: bool = True, tokens: int = 100_000, every: int = 0, name: str = "", label: str = "card"
    ) -> None:
        super().__init__(label, every)
        if tokens < 1:
            raise ConfigError(f"SparseCard.tokens must be at least 1, got {tokens}")
        self.splice, self.tokens, self.name = splice, tokens, name
        self.cards: list[Card] = []

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """The card of a small dictionary of a small language model with random weights."""
        from quire.datasets.activations.module import Activations

        return {
            **Activations.tiny(),
            "trainer": {"callbacks": [{"class_path": cls.__name__, "init_args": {"tokens": 256}}]},
        }

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a model without a sparse decoder too."""
        if stage != "predict" and _bank(pl_module) is not None:
            if not isinstance(trainer.datamodule, DataModule):  # type: ignore[attr-defined]
                raise ConfigError("SparseCard reads whole splits: give data as a Quire data module")
            return
        super().setup(trainer, pl_module, stage)
        if stage != "predict" and (said := refusal(type(self), "decoder", pl_module.decoder)):  # type: ignore[arg-type]
            raise ConfigError(said)

    def measure(self, subject: Subject, split: str, epoch: int = 0, step: int = 0) -> dict[str, float]:
        """Every number of the card, or of each member's."""
        model, rows = subject.model, [m for m in subject.model.modules() if isinstance(m, CardRow)]
        self.cards = []
        found: dict[str, float] = {}
        for key, encoder, decoder, site, seed in _dictionaries(model):
            with subject.scope():
                card = measure(
                    encoder,
                    decoder,
                    subject.source,
                    site=site,
                    tokens=min(self.tokens, QUICK) if subject.quick else self.tokens,
                    splice=self.splice,
                    extra=rows,
                    split=split,
                    name=self.name or type(encoder.selector).__name__,
                    seed=seed,
                )
            card.about |= {"split": split, "step": step}
            self.cards.append(card)
            found |= {f"/{key}{k}": v for k, v in card.numbers.items() if not math.isnan(v)}
        return found

    def extra(self, trainer: Trainer, model: Any, split: str) -> dict[str, float]:
        """The share that training counts as dead, with its window; left out while too few tokens were trained."""
        window = next((c.window for c in trainer.callbacks if isinstance(c, DeadLatents)), None)  # type: ignore[attr-defined]
        bank = _bank(model)
        found: dict[str, float] = {}
        for number, (card, (key, _, decoder, _, _)) in enumerate(zip(self.cards, _dictionaries(model))):
            own = window if bank is None else bank.members[number].parts["objective"].dead_after  # type: ignore[union-attr, index]
            if own is None or not decoder.may_have_dead(own):
                continue
            value = float(decoder.dead(own).float().mean())
            card.numbers["dead_training"] = found[f"/{key}dead_training"] = value
            card.about["dead_training_window"] = f"{own} training tokens"
        return found

    def show(self, folder: Path) -> str:
        """Write the cards; the main numbers of each as a line."""
        lines = []
        for number, card in enumerate(self.cards):
            stem = self.prefix if len(self.cards) == 1 else f"{self.prefix}-{number}"
            card.write(folder, stem)
            said = [(n, card.get(n)) for n in ("l0", "fvu", "delta_ce", "recovered_zero", "dead")]
            lines.append(f"{stem}: " + ", ".join(f"{n} {shown(v)}" for n, v in said if n in card.numbers))
            lines += [f"{stem}: {note}" for note in card.notes]
        if len(self.cards) > 1:
            pareto(self.cards, folder / "pareto.png")
        return "\n".join(lines)


def _bank(model: Any) -> DictionaryBank | None:
    objective = getattr(model, "objective", None)
    found: DictionaryBank | None = None if objective is None else objective.role(DictionaryBank)
    return found


def _dictionaries(model: Any) -> Iterator[tuple[str, Any, Any, str | None, int]]:
    """Prefix of its numbers, encoder, decoder, site and seed of the model's dictionary, or of each of a bank."""
    bank = _bank(model)
    if bank is None:
        yield "", model.encoder.role(SparseEncoder), model.decoder.role(SparseDecoder), None, model.seed
        return
    bank._place()
    for number, member in enumerate(bank._members()):
        yield f"{number}.", member.parts["encoder"], member.parts["decoder"], member.site, member.seed
