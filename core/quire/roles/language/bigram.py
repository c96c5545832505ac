"""What counting pairs of tokens reaches: the loss that a trained language model has to be clearly under."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import Dataset

from quire.contracts import Batch
from quire.errors import ConfigError
from quire.roles.language.accept import tiny_speculative
from quire.roles.language.next_token import scored

DISCOUNTS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
CHUNK = 256


class Bigrams:
    """An interpolated Kneser-Ney bigram model.

    p(w|v) = max(n(v,w) - d, 0) / n(v) + d N(v,·) / n(v) p(w), where N counts different pairs, and
    p(w) = (N(·,w) + 1) / (N(·,·) + V); behind a token that was never seen, p(w) alone.

    Args:
        vocab_size: V.
        discount: d, in (0, 1).
    """

    def __init__(self, vocab_size: int, discount: float = 0.7) -> None:
        self.vocab_size, self.discount = vocab_size, discount

    def fit(self, pairs: Tensor) -> Bigrams:
        """Count pairs [N,2] of a token and the one behind it."""
        size = self.vocab_size
        self.keys, self.counts = (pairs[:, 0] * size + pairs[:, 1]).unique(return_counts=True)
        first, second = self.keys // size, self.keys % size
        self.total = torch.zeros(size, dtype=torch.double).index_add_(0, first, self.counts.double())
        self.kinds = first.bincount(minlength=size).double()
        ends = second.bincount(minlength=size).double() + 1
        self.single = ends / ends.sum()
        return self

    def nats(self, pairs: Tensor) -> Tensor:
        """-log p of the second token of each pair [N,2] behind the first, in nats."""
        first, second = pairs[:, 0], pairs[:, 1]
        wanted = first * self.vocab_size + second
        place = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
        count = torch.where(self.keys[place] == wanted, self.counts[place], 0).double()
        total, lower = self.total[first], self.single[second]
        mixed = ((count - self.discount).clamp(min=0) + self.discount * self.kinds[first] * lower) / total.clamp(min=1)
        return -torch.where(total > 0, mixed, lower).log()


def tuned(rows: list[Tensor], vocab_size: int) -> Bigrams:
    """A model of all rows of pairs, its discount chosen on every tenth row by a model of the others."""
    held = rows[9::10]
    model = Bigrams(vocab_size)
    if held:
        model.fit(torch.cat([r for i, r in enumerate(rows) if i % 10 != 9]))
        kept = torch.cat(held)

        def loss(discount: float) -> float:
            model.discount = discount
            return float(model.nats(kept).mean())

        model.discount = min(DISCOUNTS, key=loss)
    return model.fit(torch.cat(rows))


class BigramFloor(Callback):
    """Log the loss of a bigram model beside a language model's, on the same tokens, and print both when fit ends.

    The bigram model is interpolated Kneser-Ney (Ney et al. 1994), counted on the whole training split; its discount is
    tuned on a tenth of it. Logged: ``val/bigram_loss`` in nats per token, to be compared with ``val/loss``. Printed and
    kept in ``table``: nats per token, and bits per byte of the text where the data have a tokenizer.

    Needs:
        Batches with ``tokens``; an objective that logs ``bits_per_token``, as NextToken does, for the printed table.

    Raises:
        ConfigError: data without ``tokens`` or without a ``vocab_size``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model: Bigrams | None = None
        self.table: dict[str, dict[str, float]] = {}
        self._tokens, self._bytes = 0, 0

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small language model on the standard library's text."""
        return {**tiny_speculative({}), "trainer": {"callbacks": ["BigramFloor"]}}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Count the training split."""
        if stage == "predict" or self.model is not None:
            return
        data = trainer.datamodule
        if "tokens" not in getattr(data, "fields", ()) or "vocab_size" not in data.spec:
            raise ConfigError(f"BigramFloor reads tokens of a known vocabulary; {type(data).__name__} has none")
        self.model = tuned(pairs_of(data.dataset("train")), int(data.spec["vocab_size"]))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget the last evaluation."""
        self._tokens, self._bytes = 0, 0

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Score one batch, each of its means weighted as the model's are: by rows."""
        assert self.model is not None
        counts = scored(batch, getattr(pl_module.objective, "prompt_loss", True)).cpu()
        tokens = batch["tokens"].cpu()
        nats = self.model.nats(torch.stack([tokens[:, :-1][counts], tokens[:, 1:][counts]], 1))
        stage, size = "test" if trainer.testing else "val", len(tokens)
        pl_module.log(f"{stage}/bigram_loss", nats.mean().float(), batch_size=size, on_epoch=True, sync_dist=True)
        self._tokens += int(counts.sum())
        tokenizer = getattr(trainer.datamodule, "tokenizer", None)
        if tokenizer is not None:
            self._bytes += sum(
                len(tokenizer.decode(row[1:][kept].tolist()).encode()) for row, kept in zip(tokens, counts)
            )

    on_test_start, on_test_batch_end = on_validation_start, on_validation_batch_end

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Set model and bigram model side by side."""
        if trainer.sanity_checking:
            return
        stage, logged = "test" if trainer.testing else "val", trainer.callback_metrics
        found = {}
        if (bits := logged.get(f"{stage}/bits_per_token")) is not None:
            found[type(pl_module.decoder).__name__] = float(bits) * math.log(2)
        if (floor := logged.get(f"{stage}/bigram_loss")) is not None:
            found["bigram model"] = float(floor)
        self.table = {name: self._units(nats) for name, nats in found.items()}

    on_test_end = on_validation_end

    def _units(self, nats: float) -> dict[str, float]:
        row = {"nats per token": nats, "bits per token": nats / math.log(2)}
        return {**row, "bits per byte": row["bits per token"] * self._tokens / self._bytes} if self._bytes else row

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Print the table."""
        for name, row in self.table.items() if trainer.is_global_zero else ():
            print(f"held-out loss, {name}: " + ", ".join(f"{v:.3f} {unit}" for unit, v in row.items()))


def pairs_of(data: Dataset) -> list[Tensor]:
    """Pairs [n,2] of neighbouring real tokens of each row of a split."""
    rows = []
    for start in range(0, len(data), CHUNK):  # type: ignore[arg-type]
        batch = data.__getitems__(list(range(start, min(start + CHUNK, len(data)))))  # type: ignore[arg-type, attr-defined]
        tokens, counts = batch["tokens"], scored(batch, True)
        rows += [torch.stack([t[:-1][c], t[1:][c]], 1) for t, c in zip(tokens, counts)]
    return rows
