"""Batches as rows of ids, and rows as the slots of one step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quire.contracts import Batch
from quire.errors import ConfigError
from quire.roles.language.contract import Caps, Draft, Generated
from quire.roles.language.stats import Stats
from quire.roles.language.stop import StopRule


@dataclasses.dataclass
class Row:
    """One continuation under way."""

    place: int
    prompt: list[int]
    stop: StopRule
    generator: torch.Generator
    pending: int = 0
    stats: Stats = dataclasses.field(default_factory=lambda: Stats(rows=1))

    @property
    def context(self) -> list[int]:
        """Prompt and everything emitted."""
        return self.prompt + self.stop.emitted


def prompts_of(batch: Batch, caps: Caps) -> list[list[int]]:
    """Prompt ids of each row: its real tokens, up to ``prompt_length`` if there is one; nothing behind a source."""
    if "source" in batch:
        count = len(batch["source"])
        rows: list[list[int]] = [[] for _ in range(count)]
    else:
        mask = batch.get("mask")
        tokens = batch["tokens"]
        real = tokens.new_ones(tokens.shape, dtype=torch.bool) if mask is None else mask
        rows = [t[m].tolist() for t, m in zip(tokens, real)]
        if "prompt_length" in batch:
            rows = [r[:n] for r, n in zip(rows, batch["prompt_length"].tolist())]
    for i, row in enumerate(rows):
        if not row:
            if caps.start_id is None:
                raise ConfigError(f"prompt {i} is empty and the tokenizer has no start token")
            row.append(caps.start_id)
    return rows


def limit_of(place: int, prompt: list[int], caps: Caps, wanted: int, max_total: int | None = None) -> int:
    """New tokens that a row may have. Raises ``ConfigError`` when its prompt fills the model already."""
    most = min((n for n in (caps.positions_max, max_total) if n is not None), default=None)
    if most is None:
        return wanted
    if len(prompt) >= most and wanted:
        raise ConfigError(f"prompt {place} has {len(prompt)} tokens; the model takes {most}")
    return min(wanted, most - len(prompt))


def decoder_of(model: Any, stop: list[str]) -> Callable[[list[int]], str] | None:
    """Ids → text by the model's tokenizer, None without one. Raises ``ConfigError`` when stop strings need one."""
    decode: Callable[[list[int]], str] | None = getattr(getattr(model, "tokenizer", None), "decode", None)
    if stop and decode is None:
        raise ConfigError("sampler.stop needs a tokenizer: use a text data module, or end by token")
    return decode


def sources_of(batch: Batch) -> list[list[int]] | None:
    """What an editing drafter may copy: the source, or the marked slice of the prompt."""
    if "source" in batch:
        mask = batch.get("source_mask")
        real = torch.ones_like(batch["source"], dtype=torch.bool) if mask is None else mask
        return [s[m].tolist() for s, m in zip(batch["source"], real)]
    if "source_span" in batch:
        mask = batch.get("mask")
        real = torch.ones_like(batch["tokens"], dtype=torch.bool) if mask is None else mask
        return [t[m].tolist()[a:b] for t, m, (a, b) in zip(batch["tokens"], real, batch["source_span"].tolist())]
    return None


def left_aligned(ids: Tensor, mask: Tensor | None, what: str) -> tuple[Tensor, list[int], Tensor | None]:
    """Move each row's real tokens to the left, so that slot and position agree whatever side was padded.

    Returns:
        Ids [B,T], the rows' lengths, and the place of each old column [B,T] (None when nothing has moved).

    Raises:
        ConfigError: a row without real tokens.
    """
    if mask is None:
        return ids, [ids.shape[1]] * len(ids), None
    counts = mask.sum(1).tolist()
    if min(counts) == 0:
        raise ConfigError(f"{what} {counts.index(0)} has no real tokens")
    back = None
    if bool((mask[:, 1:] > mask[:, :-1]).any()):
        order = (~mask).long().argsort(dim=1, stable=True)
        ids, mask, back = ids.gather(1, order), mask.gather(1, order), order.argsort(dim=1)
    return ids.where(mask, ids[:, :1]), counts, back  # a real id behind: transformers warns of pad ids without a mask


def opening(
    prompt: Tensor, mask: Tensor | None, draft: Tensor | None, most: int | None
) -> tuple[Tensor, list[int], Tensor]:
    """What a prefill reads: left-aligned prompts, each with its draft behind it.

    Args:
        prompt, mask: [B,T]; a row without real tokens, or longer than ``most``, is refused.
        draft: [B,Q] or None.
        most: Positions of the model, or None.

    Returns:
        Ids [B,T+Q], the rows' lengths, and the places [B,1+Q] of each row's last prompt token and draft.
    """
    ids, counts, _ = left_aligned(prompt, mask, "prompt")
    reach = 0 if draft is None else draft.shape[1]
    at = torch.tensor(counts, device=ids.device)[:, None] - 1 + torch.arange(1 + reach, device=ids.device)
    if draft is not None:
        ids = torch.cat([ids, draft], 1).scatter(1, at[:, 1:], draft)
    counts = [n + reach for n in counts]
    if most is not None and max(counts) > most:
        raise ConfigError(f"prompt {counts.index(max(counts))} has {max(counts)} tokens; the model takes {most}")
    return ids[:, : max(counts)], counts, at


def padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Right-padded ids [B,L] and mask, or None when nothing is padded."""
    longest = max(len(r) for r in rows)
    ids = torch.tensor([r + [pad] * (longest - len(r)) for r in rows], device=device)
    if all(len(r) == longest for r in rows):
        return ids, None
    lengths = torch.tensor([len(r) for r in rows], device=device)
    return ids, torch.arange(longest, device=device) < lengths[:, None]


def slots(
    alive: list[Row], drafts: list[Draft | None], device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Ids, parents and validity of one step: slot 0 is the pending token, slot i+1 is node i.

    Parents and validity stay on the CPU, where they are read.
    """
    width = 1 + max(len(d.tokens) if d is not None else 0 for d in drafts)
    ids, parents, valid, chain = [], [], [], True
    for row, draft in zip(alive, drafts):
        tokens = draft.tokens if draft is not None else []
        above = [-1, *(p + 1 for p in draft.parents)] if draft is not None else [-1]
        chain = chain and above == list(range(-1, len(tokens)))
        fill = width - 1 - len(tokens)
        ids.append([row.pending, *tokens, *[row.pending] * fill])
        parents.append(above + [-1] * fill)
        valid.append([True] * (1 + len(tokens)) + [False] * fill)
    whole = all(all(v) for v in valid)
    return (
        torch.tensor(ids, device=device),
        None if chain else torch.tensor(parents),
        None if whole else torch.tensor(valid),
    )


def tree(parents: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Depth [B,Q] of each slot and its ancestors and self [B,Q,Q], from the slot before each one (-1: none)."""
    depths, masks = [], []
    for row in parents:
        depth: list[int] = []
        seen: list[list[bool]] = []
        for i, parent in enumerate(row):
            depth.append(0 if parent < 0 else depth[parent] + 1)
            line = [False] * len(row) if parent < 0 else list(seen[parent])
            line[i] = True
            seen.append(line)
        depths.append(depth)
        masks.append(seen)
    return torch.tensor(depths, device=device), torch.tensor(masks, device=device)


def select(codes: Any, rows: list[int], total: int) -> Any:
    """The codes of some rows."""
    if rows == list(range(total)):
        return codes
    picked = {
        f.name: v[rows]
        for f in dataclasses.fields(codes)
        if isinstance(v := getattr(codes, f.name), Tensor) and v.ndim and len(v) == total
    }
    return dataclasses.replace(codes, **picked)


def predictions(model: Any, results: list[Generated]) -> list[dict[str, Any]]:
    """One row a prompt for a predictions file, and the summed statistics last."""
    decode = getattr(getattr(model, "tokenizer", None), "decode", None)
    total = functools.reduce(Stats.merge, (r.stats for r in results), Stats())
    return [*(row for result in results for row in rows_of(result, decode)), {"stats": total.to_dict()}]


def rows_of(result: Generated, decode: Callable[[list[int]], str] | None) -> list[dict[str, Any]]:
    """Plain rows for a predictions file."""
    rows = []
    for index, tokens, finish in zip(result.index, result.tokens, result.finish):
        row: dict[str, Any] = {"index": index, "tokens": tokens, "finish": finish}
        if decode is not None:
            row["text"] = [decode(t) for t in tokens]
        rows.append(row)
    for row, scores in zip(rows, result.scores):
        row["scores"] = scores
    return rows
