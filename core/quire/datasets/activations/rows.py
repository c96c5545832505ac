"""The source's rows in the order they are read: a function of (seed, epoch), so the place in it is one number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from quire.contracts import Batch
from quire.data import mix
from quire.errors import DataError

WINDOW = 16
"""Forward passes whose rows are sorted by length together, so a pass holds rows of about one length."""


class Instances(Dataset):
    """Rows of different lengths, each run by itself from position 0: dialogues, prompts, lines.

    Args:
        tokens: Ids of each row.
        special: True where a token is scaffolding: ends, roles, padding of a template; one tensor a row.
        pad: Id that fills rows on the right.
        **fields: What each row has one of, such as ``label``.

    Raises:
        DataError: no row, or an empty one.
    """

    def __init__(
        self, tokens: Sequence[Tensor], special: Sequence[Tensor] | None = None, pad: int = 0, **fields: Tensor
    ) -> None:
        self.tokens, self.special, self.pad, self.fields = list(tokens), special, pad, fields
        self.lengths = torch.tensor([len(t) for t in self.tokens])
        if not len(self.tokens) or int(self.lengths.min()) == 0:
            empty = int(self.lengths.argmin()) if len(self.tokens) else 0
            raise DataError(f"instance {empty} has no token" if len(self.tokens) else "there is no instance")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> Batch:
        return {k: v[0] for k, v in self.__getitems__([i]).items()}

    def __getitems__(self, indices: list[int]) -> Batch:
        most = int(self.lengths[indices].max())
        tokens = torch.full((len(indices), most), self.pad, dtype=torch.long)
        mask = torch.zeros(len(indices), most, dtype=torch.bool)
        special = torch.zeros(len(indices), most, dtype=torch.bool)
        for row, i in enumerate(indices):
            length = len(self.tokens[i])
            tokens[row, :length] = self.tokens[i]
            mask[row, :length] = True
            if self.special is not None:
                special[row, :length] = self.special[i]
        return {"tokens": tokens, "mask": mask, "special": special, **{k: v[indices] for k, v in self.fields.items()}}

    def content(self) -> Tensor:
        """[N] tokens of each row that are not special."""
        if self.special is None:
            return self.lengths
        return torch.tensor([int((~torch.as_tensor(s)).sum()) for s in self.special])


class Rows:
    """One split of the source as batches for the subject.

    Args:
        data: The split.
        contexts: Rows in a forward pass.
        drop_special: Special tokens are not fed.
        constant: Tokens of a row, where rows don't say how many they have (pictures).
        seed: Of the order.
    """

    def __init__(self, data: Any, contexts: int, drop_special: bool, constant: int | None, seed: int) -> None:
        self.data, self.contexts, self.seed = data, contexts, seed
        self.lengths, self.counts = _counts(data, drop_special, constant)

    def plan(self, epoch: int, shuffle: bool, rank: int = 0, world: int = 1) -> list[list[int]]:
        """Indices of each forward pass of one epoch: this rank's, as many rows on each rank as on the others."""
        total = len(self.data)
        order = torch.arange(total)
        if shuffle:
            order = torch.randperm(total, generator=torch.Generator().manual_seed(mix(self.seed, 1, epoch)))
        order = order[: total // world * world][rank::world] if total >= world else order
        if int(self.lengths.min()) == int(self.lengths.max()):
            return [part.tolist() for part in order.split(self.contexts)]
        made: list[list[int]] = []
        for window in order.split(self.contexts * WINDOW):
            by_length = window[self.lengths[window].argsort(stable=True)]
            parts = by_length.split(self.contexts)
            if shuffle:  # or every window would go from short rows to long ones
                key = torch.Generator().manual_seed(mix(self.seed, 2, epoch, len(made)))
                parts = tuple(parts[i] for i in torch.randperm(len(parts), generator=key).tolist())
            made += [part.tolist() for part in parts]
        return made

    def fed(self, plan: list[list[int]]) -> int:
        """Tokens that a plan feeds."""
        return int(self.counts[[i for part in plan for i in part]].sum()) if plan else 0

    def batch(self, indices: list[int]) -> Batch:
        """Rows as a batch, no wider than its longest row, with ``index``."""
        fetch = getattr(self.data, "__getitems__", None)
        batch = fetch(indices) if fetch else default_collate([self.data[i] for i in indices])
        batch = dict(batch) if isinstance(batch, dict) else default_collate(batch)
        batch["index"] = torch.as_tensor(indices)
        mask = batch.get("mask")
        if mask is not None and not bool(mask[:, -1].any()):
            wide = int(mask.any(0).nonzero().max()) + 1 if bool(mask.any()) else 1
            shape = mask.shape
            batch = {k: v[:, :wide] if isinstance(v, Tensor) and v.shape[:2] == shape else v for k, v in batch.items()}
        return batch


def _counts(data: Any, drop_special: bool, constant: int | None) -> tuple[Tensor, Tensor]:
    """Tokens of each row, and how many of them are fed."""
    if isinstance(data, Instances):
        return data.lengths, data.content() if drop_special else data.lengths
    tensors = getattr(data, "tensors", None) or {}
    tokens, mask, special = (tensors.get(k) for k in ("tokens", "mask", "special"))
    if constant is not None or tokens is None:
        every = torch.full((len(data),), 1 if constant is None else constant)
        return every, every
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    fed = real & ~special if drop_special and special is not None else real
    return real.sum(1), fed.sum(1)
