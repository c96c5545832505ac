"""Rows of measurements as a table on the screen, as CSV and as JSON."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quire.commands import table


@dataclass
class Row:
    """One accuracy.

    Args:
        probe: Name of the probe.
        features: What was judged: ``encoder``, ``random`` (the same encoder untrained), ``raw`` (the input itself)
            or ``majority`` (the commonest training class, no features at all).
        split: Where accuracy was measured.
        accuracy: Share of right answers, in [0,1]; NaN where this row can't be had, then ``note`` says why.
        samples: Samples judged.
        train_samples: Samples the probe learnt from.
        epoch: Epochs trained.
        step: Optimizer steps taken.
        setting: What the probe chose or was given.
        note: A remark.
    """

    probe: str
    features: str
    split: str
    accuracy: float
    samples: int
    train_samples: int
    epoch: int = 0
    step: int = 0
    setting: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def error(self) -> float:
        """Standard error of the accuracy over ``samples``."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / max(1, self.samples))

    def plain(self) -> dict[str, Any]:
        """Plain values; an accuracy that can't be had is None."""
        return {**asdict(self), "accuracy": None if math.isnan(self.accuracy) else self.accuracy}


def text(rows: Sequence[Row]) -> str:
    """A table of percentages, each with its standard error over the judged samples."""
    cells = []
    for row in rows:
        number = "-" if math.isnan(row.accuracy) else f"{100 * row.accuracy:.1f} ± {100 * row.error:.1f}"
        setting = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.setting.items())
        cells.append([row.probe, row.features, row.split, number, str(row.train_samples), row.note or setting])
    return table(cells, ["probe", "features", "split", "accuracy %", "trained on", "setting"])


def write(rows: Sequence[dict[str, Any]], folder: Path, name: str) -> list[Path]:
    """``folder/name.csv`` and ``folder/name.json``, written whole; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    as_csv, as_json = folder / f"{name}.csv", folder / f"{name}.json"
    with as_csv.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, columns)
        writer.writeheader()
        writer.writerows({k: json.dumps(v) if isinstance(v, dict) else v for k, v in row.items()} for row in rows)
    as_json.write_text(json.dumps(list(rows), indent=2) + "\n", encoding="utf-8")
    return [as_csv, as_json]
