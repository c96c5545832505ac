"""What all probes share: a readout of frozen features, beside an untrained encoder and the raw input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.contracts import Encoder
from quire.errors import ConfigError
from quire.roles.probes.features import (
    Features,
    Read,
    check_class_token,
    check_pooling,
    codes_of,
    pooled,
)
from quire.roles.probes.raw import raw_vector
from quire.roles.probes.report import Row, text, write
from quire.roles.probes.subject import Subject
from quire.roles.probes.watch import Watch


class Probe(Watch):
    """Base of the probes. Subclass it and write ``predict``.

    The encoder is in eval mode, without gradients, on everything that the data has, nothing masked. Training is
    not changed by it: weights, modes and random streams are the same with and without.

    Args:
        label: Name in the log and of the files.
        every: Epochs between two measurements; 0 is only at the end of ``fit``, in ``validate`` and ``test``.
        max_train: At most this many training samples, drawn by a seeded permutation; null takes all.
        pooling: ``mean`` over real tokens, or ``class``.
        layer: Hidden states of this layer before the final norm (0 is the embedding), null for the encoder's output.
    """

    fields = ("label",)

    def __init__(self, label: str, every: int, max_train: int | None, pooling: str, layer: int | None) -> None:
        super().__init__(label, every)
        check_pooling(pooling, self)
        if max_train is not None and max_train < 1:
            raise ConfigError(f"{type(self).__name__}.max_train must be at least 1 or null, got {max_train}")
        self.max_train, self.pooling, self.layer = max_train, pooling, layer
        self.rows: list[Row] = []
        self._beside: dict[str, list[Row]] = {}  # rows of the split that no training changes

    # ---- what a subclass writes
    def predict(
        self, train: Features, judged: Features, classes: int, subject: Subject
    ) -> tuple[Tensor, dict[str, Any]]:
        """Learn from labelled training features, answer for unlabelled ones.

        Returns:
            Predicted classes [N], and the setting used.
        """
        raise NotImplementedError

    def reader(self, encoder: Encoder) -> Read:
        """What is kept of a batch: here one vector a sample."""
        return lambda batch: (pooled(codes_of(encoder, batch, self.layer, self), self.pooling), None)

    def raw(self, encoder: Encoder) -> Read:
        """The same of the input itself."""
        return lambda batch: (raw_vector(batch), None)

    def fits(self, encoder: Encoder) -> None:
        """Class pooling needs a class token."""
        check_class_token(encoder.sizes(), self.pooling, self)

    # ---- measuring
    def measure(self, subject: Subject, split: str, epoch: int = 0, step: int = 0) -> dict[str, float]:
        """Accuracy of the encoder and of the rows beside it, which are measured once a split; keeps them all."""
        own, majority = self._row("encoder", subject, self.reader(subject.encoder), split)
        own.epoch, own.step = epoch, step
        if split not in self._beside:
            self._beside[split] = [self._random(subject, split), self._raw(subject, split), majority]
            self.rows += self._beside[split]
        self.rows.append(own)
        beside = {f"_{r.features}": r.accuracy for r in self._beside[split] if r.features in ("random", "raw")}
        return {"": own.accuracy, **{k: v for k, v in beside.items() if not math.isnan(v)}}

    def _row(self, features: str, subject: Subject, read: Read, split: str) -> tuple[Row, Row]:
        train = subject.collect(read, "train", self.max_train)
        judged = subject.collect(read, split)
        known, wanted = train.need_label(self), judged.need_label(self)
        classes = int(max(known.max(), wanted.max())) + 1
        torch.manual_seed(subject.seed)
        found, setting = self.predict(train, judged.unlabelled(), classes, subject)

        def row(name: str, answers: Tensor, setting: dict[str, Any]) -> Row:
            accuracy = float((answers == wanted).double().mean())
            return Row(self.prefix, name, split, accuracy, len(judged), len(train), setting=setting)

        return row(features, found.cpu(), setting), row("majority", known.bincount().argmax(), {})

    def _random(self, subject: Subject, split: str) -> Row:
        try:
            twin = subject.untrained()
            return self._row("random", subject, self.reader(twin), split)[0]
        except ConfigError as error:  # an encoder that can't be made anew, or must be fitted first
            return Row(self.prefix, "random", split, math.nan, 0, 0, note=str(error))

    def _raw(self, subject: Subject, split: str) -> Row:
        try:
            return self._row("raw", subject, self.raw(subject.encoder), split)[0]
        except ConfigError as error:
            return Row(self.prefix, "raw", split, math.nan, 0, 0, note=str(error))

    # ---- showing
    def latest(self) -> list[Row]:
        """The last encoder row of each split with the rows beside it."""
        own = {row.split: row for row in self.rows if row.features == "encoder"}
        return [row for split, last in own.items() for row in (last, *self._beside.get(split, []))]

    def show(self, folder: Path) -> str:
        """Write every row so far; the latest ones as a table."""
        write([row.plain() for row in self.rows], folder, f"probe_{self.prefix}")
        return text(self.latest())

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, so a resumed run writes the whole history."""
        return {**super().state_dict(), "rows": [row.plain() for row in self.rows if row.features == "encoder"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history; rows that no training changes are measured anew."""
        super().load_state_dict(state_dict)
        self.rows = [Row(**row) for row in state_dict["rows"]]


def tiny_run(name: str, encoder: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """The tiny example of a callback: classify a few digits, with the callback listed."""
    return {
        "model": {"encoder": encoder, "objective": "Classify"},
        "data": {"class_path": "Digits", "init_args": {"train_samples": 256}},
        "trainer": {"callbacks": [{"class_path": name, "init_args": arguments}]},
    }


TINY_VIT = {"class_path": "ViTEncoder", "init_args": {"patch": 4, "width": 16, "depth": 1, "heads": 2}}
