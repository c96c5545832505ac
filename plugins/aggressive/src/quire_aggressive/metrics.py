"""What decoding with a drafter gives on pairs: the right edits, BLEU, passes saved, and outputs changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from quire.contracts import Batch, Metric
from quire.roles.language.contract import Generated, StepModel
from quire.roles.language.loop import Greedy, Speculative
from quire_aggressive.edits import bleu, bleu_counts, edit_counts, f_score

COUNTS = ("right", "made", "wanted", "rows", "exact", "changed", "compared", "steps", "accepted", "passes", "tokens")


class EditScores(Metric):
    """F0.5 of edits, BLEU, and what drafting saved, over a prediction run on pairs. Ge et al. 2022.

    Texts are compared by words where the run has a tokenizer, by ids otherwise. An edit is a stretch where the longest
    matching blocks of source and output differ; ERRANT's types and merges are not replicated. Where the data module
    has several references, edits count against the best one of each row, BLEU against all.

    Args:
        greedy: Also decode each batch plainly and count the rows whose ids differ: what a tolerant acceptance rule
            changes. Costs a second decoding.

    Returns:
        F0.5, 0 before any prediction. ``predict`` writes all of ``scores()`` to ``edit_scores.json``.
    """

    full_state_update = False
    counts: Tensor
    grams: Tensor

    def __init__(self, greedy: bool = False) -> None:
        super().__init__()
        self.greedy = greedy
        self.add_state("counts", torch.zeros(len(COUNTS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("grams", torch.zeros(10, dtype=torch.float64), dist_reduce_fx="sum")

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Copy digit strings."""
        from quire_aggressive.source import SourceCopy

        run = SourceCopy.tiny()
        run["model"]["metrics"] = [{"class_path": cls.__name__, "init_args": {"greedy": True}}]
        return run

    def update(self, source: Sequence[Any], output: Sequence[Any], references: Sequence[Sequence[Any]]) -> None:
        """Add one row: words or ids of the source, the output and each reference."""
        right, made, wanted = edit_counts(source, output, references)
        exact = any(list(output) == list(r) for r in references)
        self._add(right=right, made=made, wanted=wanted, rows=1, exact=exact)
        self.grams += torch.tensor(bleu_counts(output, references), dtype=torch.float64, device=self.grams.device)

    def sampled(self, model: Any, batch: Batch, results: Any) -> None:
        """Read a language sampler's results on pairs; on anything else only its statistics."""
        if not isinstance(results, Generated):
            return
        stats = results.stats
        self._add(steps=stats.steps, accepted=stats.accepted, passes=stats.passes, tokens=stats.new_tokens)
        self._computed = None
        self._update_count += 1
        for output, (source, references) in zip(results.tokens, pairs_of(model, batch, results.index)):
            self.update(source, _words(model, output[0]), references)
        if self.greedy and isinstance(model.sampler, Speculative):
            own = model.sampler
            plain = Greedy(own.max_new_tokens, own.max_total, own.strings)
            plain.processors = own.processors
            other = plain(model, batch).tokens
            self._add(changed=sum(a != b for a, b in zip(results.tokens, other)), compared=len(other))

    def _add(self, **found: float) -> None:
        more = [float(found.get(name, 0)) for name in COUNTS]
        self.counts += torch.tensor(more, dtype=torch.float64, device=self.counts.device)

    def compute(self) -> Tensor:
        """F0.5 of the edits."""
        right, made, wanted = self.counts[:3].tolist()
        return torch.tensor(f_score(right, made, wanted) if self.counts[3] else 0.0)

    def scores(self) -> dict[str, float]:
        """``f05``, ``precision``, ``recall``, ``bleu``, ``exact`` and what drafting saved.

        ``exact`` is the share of rows equal to a reference; ``accepted`` is per step, without the bonus token;
        ``iterations`` is steps per row, ``tokens_per_pass`` counts passes over prompts too; with ``greedy``,
        ``changed`` is the share of rows that differ from it.
        """
        c = dict(zip(COUNTS, self.counts.tolist()))
        rows, steps = max(1.0, c["rows"]), max(1.0, c["steps"])
        scores = {
            "f05": float(self.compute()),
            "precision": c["right"] / max(1.0, c["made"]),
            "recall": c["right"] / max(1.0, c["wanted"]),
            "bleu": bleu(self.grams.tolist()),
            "exact": c["exact"] / rows,
            "accepted": c["accepted"] / steps,
            "iterations": c["steps"] / rows,
            "tokens_per_pass": c["tokens"] / max(1.0, c["passes"]),
        }
        return {**scores, "changed": c["changed"] / c["compared"]} if c["compared"] else scores

    def callbacks(self) -> list[Callback]:
        """What writes ``scores()``."""
        return [WriteEditScores()]


class WriteEditScores(Callback):
    """Write ``edit_scores.json`` beside the predictions."""

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """From the first EditScores of the model, summed over ranks."""
        metric = next((m for m in pl_module.metrics if isinstance(m, EditScores)), None)
        if metric is None or not metric.update_called:
            return
        with metric.sync_context(should_sync=trainer.world_size > 1):
            scores = metric.scores()
        folder = Path(trainer.log_dir or ".")  # asked on every rank: it waits for rank 0
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "edit_scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
            print(f"wrote {folder / 'edit_scores.json'}")


def pairs_of(model: Any, batch: Batch, index: list[int]) -> list[tuple[list[Any], list[list[Any]]]]:
    """Source and references of each row, as words or ids; empty where the batch holds no pairs."""
    if "tokens" not in batch or not ("source" in batch or "prompt_length" in batch):
        return []
    texts = getattr(getattr(model, "datamodule", None), "texts", None)
    tokenizer = getattr(model, "tokenizer", None)
    if texts is not None and tokenizer is not None:
        pairs = texts("test")
        if index and max(index) < len(pairs):
            return [(pairs[i].source.split(), [t.split() for t in pairs[i].targets]) for i in index]
    found = []
    mask = batch.get("mask")
    for row, tokens in enumerate(batch["tokens"]):
        ids = tokens.tolist() if mask is None else tokens[mask[row]].tolist()
        if "source" in batch:
            real = batch.get("source_mask")
            source = batch["source"][row].tolist() if real is None else batch["source"][row][real[row]].tolist()
            target = ids[1:]
        else:
            length = int(batch["prompt_length"][row])
            start, end = batch["source_span"][row].tolist() if "source_span" in batch else (0, length)
            source, target = ids[start:end], ids[length:]
        found.append((_words(model, source), [_words(model, target)]))
    return found


def _words(model: Any, ids: list[int]) -> list[Any]:
    """Words where the run has a tokenizer, else ids without the end token."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None:
        return tokenizer.decode(ids).split()
    ends = model.decoder.role(StepModel).caps().eos_ids
    return [i for i in ids if i not in ends]
