"""What ``predict`` leaves behind: every rank's results, in the order of the data, in plain files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from quire.contracts import Codes


class WritePredictions(Callback):
    """Write predictions beside the run's log: tensors to ``predictions.safetensors``, rows to ``predictions.jsonl``.

    Batches are gathered from all ranks and put in ``index`` order; a sampler's ``finish`` then sees them all, once.
    """

    def __init__(self) -> None:
        self._results: list[tuple[list[int], Any]] = []

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget an earlier run."""
        self._results = []

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep one batch's results with its indices."""
        index = batch["index"].tolist() if isinstance(batch, dict) and "index" in batch else [batch_idx]
        self._results.append((index, _cpu(outputs)))

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Gather, finish, write."""
        results: Any = [r for _, r in self._results]
        if trainer.world_size > 1:
            everyone: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, self._results)
            results = in_order([item for rank in everyone for item in rank])
        if pl_module.sampler is not None:
            results = pl_module.sampler.finish(pl_module, results)
        folder = Path(trainer.log_dir or ".")  # asked on every rank: it waits for rank 0
        metrics = {type(m).__name__: m.compute() for m in pl_module.metrics if m.update_called}
        if trainer.is_global_zero:
            if metrics:
                file = folder / "metrics.json"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(_plain(metrics), indent=2) + "\n", encoding="utf-8")
                print(f"wrote {file}")
            for file in write(results, folder):
                print(f"wrote {file}")


def in_order(gathered: list[tuple[list[int], Any]]) -> list[Any]:
    """Several ranks' results as one batch in ``index`` order, each sample once.

    Ranks take samples in turn, and repeat some so that all have as many. Results that don't tell samples apart stay
    batches, ordered by their first index.

    Args:
        gathered: (indices, results) of each batch: a dict of tensors [B,…], a tensor [B,…], or a list of B rows.
    """
    gathered = sorted(gathered, key=lambda pair: pair[0][0])
    index = [i for indices, _ in gathered for i in indices]
    first = {i: place for place, i in reversed(list(enumerate(index)))}
    places = [first[i] for i in sorted(first)]
    results = [r for _, r in gathered]
    if not all(_lengths(r) == {len(indices)} for indices, r in gathered):
        return results
    if isinstance(results[0], list):
        rows = [row for batch in results for row in batch]
        return [[rows[p] for p in places]]
    if isinstance(results[0], Tensor):
        return [torch.cat(results)[places]]
    return [{k: _joined([batch[k] for batch in results])[places] for k in results[0]}]


def _lengths(result: Any) -> set[int]:
    if isinstance(result, dict):
        return {len(v) if isinstance(v, Tensor) and v.ndim else -1 for v in result.values()}
    return {len(result)} if isinstance(result, (list, Tensor)) else set()


def write(results: Any, folder: Path) -> list[Path]:
    """Write results to files in ``folder``; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    batches = results if isinstance(results, list) else [results]
    if batches and all(isinstance(b, dict) and all(isinstance(v, Tensor) for v in b.values()) for b in batches):
        file = folder / "predictions.safetensors"
        save_file({k: _joined([b[k] for b in batches]).contiguous() for k in batches[0]}, str(file))
        return [file]
    rows = [row for b in batches for row in (b if isinstance(b, list) else [b])]
    file = folder / "predictions.jsonl"
    with file.open("w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(_plain(row)) + "\n")
    return [file]


def _joined(batches: list[Tensor]) -> Tensor:
    """Batches behind each other; rows of different length, as sparse codes have, are filled up with 0."""
    sizes = [max(lengths) for lengths in zip(*(b.shape[1:] for b in batches))]
    pads = [[n for size, have in zip(sizes[::-1], b.shape[:0:-1]) for n in (0, size - have)] for b in batches]
    return torch.cat([pad(b, p) if any(p) else b for b, p in zip(batches, pads)])


def _cpu(value: Any) -> Any:
    if isinstance(value, Codes):
        value = value.tensors()
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {k: _cpu(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_cpu(v) for v in value]
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
