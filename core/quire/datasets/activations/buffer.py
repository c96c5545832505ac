"""The mixing buffer: fill, shuffle, serve a part, keep the rest, refill; drain at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quire.errors import ConfigError

Chunk = dict[str, Tensor]


class Buffer:
    """Mixes rows of many chunks. Rows are written once and read once: a served row's slot takes the next new row.

    What comes out is what went in, each row once, but for a tail shorter than a batch at the end.

    Args:
        capacity: Most rows held.
        batch_size: Rows served at a time.
        keep: Share that stays behind, mixed with what comes next; in [0, 1).
        seed: Of the shuffles.

    Raises:
        ConfigError: a capacity below a batch, or ``keep`` outside [0, 1).
    """

    def __init__(self, capacity: int, batch_size: int, keep: float, seed: int) -> None:
        if capacity < batch_size:
            raise ConfigError(f"data.buffer is {capacity} rows, less than a batch of {batch_size}: raise it")
        if not 0 <= keep < 1:
            raise ConfigError(f"data.keep must be in [0, 1), got {keep}")
        self.capacity, self.batch_size, self.keep = capacity, batch_size, keep
        self.generator = torch.Generator().manual_seed(seed)
        self.pool: Chunk = {}
        self.pending: Chunk = {}
        self.order = torch.empty(0, dtype=torch.long)
        self.used = self.at = self.until = 0
        self.ended = False

    def next(self, pull: Callable[[], Chunk | None]) -> Chunk | None:
        """The next batch; None when everything has been served.

        Args:
            pull: Gives the next chunk of rows, None at the end.
        """
        if self.at + self.batch_size > self.until:
            self._refill(pull)
            if self.until < self.batch_size:
                return None
        index = self.order[self.at : self.at + self.batch_size].to(next(iter(self.pool.values())).device)
        self.at += self.batch_size
        return {k: v[index] for k, v in self.pool.items()}

    def _refill(self, pull: Callable[[], Chunk | None]) -> None:
        kept = self.order[self.at :]
        free = torch.cat([self.order[: self.at].sort().values, torch.arange(self.used, self.capacity)])
        taken = 0
        while taken < len(free) and not (self.ended and not self.pending):
            chunk = self.pending or self._pulled(pull)
            self.pending = {}
            if not chunk:
                continue
            rows = len(next(iter(chunk.values())))
            room = len(free) - taken
            if rows > room:
                self.pending = {k: v[room:].clone() for k, v in chunk.items()}
                chunk, rows = {k: v[:room] for k, v in chunk.items()}, room
            self._write(free[taken : taken + rows], chunk)
            taken += rows
        filled = torch.cat([kept, free[:taken]]).sort().values
        self.used = max(self.used, int(filled[-1]) + 1 if len(filled) else 0)
        self.order = filled[torch.randperm(len(filled), generator=self.generator)]
        share = len(filled) if self.ended else max(self.batch_size, int(len(filled) * (1 - self.keep)))
        self.at, self.until = 0, share // self.batch_size * self.batch_size

    def _pulled(self, pull: Callable[[], Chunk | None]) -> Chunk:
        chunk = pull()
        self.ended = chunk is None
        return chunk or {}

    def _write(self, slots: Tensor, chunk: Chunk) -> None:
        if not self.pool:
            self.pool = {k: v.new_empty(self.capacity, *v.shape[1:]) for k, v in chunk.items()}
        first, last = int(slots[0]), int(slots[-1])
        for name, values in chunk.items():
            if last - first + 1 == len(slots):  # one stretch: a copy, no scatter
                self.pool[name][first : last + 1] = values
            else:
                self.pool[name].index_copy_(0, slots.to(values.device), values)

    # ---- resume
    def state(self) -> tuple[dict[str, Any], Chunk]:
        """Plain values for the checkpoint, and the rows for a file beside it."""
        plain = {"used": self.used, "at": self.at, "until": self.until, "ended": self.ended}
        rows = {f"pool.{k}": v[: self.used] for k, v in self.pool.items()}
        rows |= {f"pending.{k}": v for k, v in self.pending.items()}
        return {**plain, "generator": self.generator.get_state()}, {**rows, "order": self.order}

    def restore(self, plain: dict[str, Any], rows: Chunk, device: torch.device) -> None:
        """Take up a state; the next batch is the one that would have come."""
        self.used, self.at, self.until, self.ended = (plain[k] for k in ("used", "at", "until", "ended"))
        self.generator.set_state(plain["generator"].cpu())
        self.order = rows["order"].clone()
        self.pending = {k.removeprefix("pending."): v.to(device) for k, v in rows.items() if k.startswith("pending.")}
        self.pool = {}
        for key, values in rows.items():
            if key.startswith("pool."):
                if len(values) > self.capacity:
                    raise ConfigError(
                        f"the checkpoint's buffer holds {len(values)} rows, data.buffer is {self.capacity}:"
                        " make them agree"
                    )
                pool = values.new_empty(self.capacity, *values.shape[1:], device=device)
                pool[: self.used] = values.to(device)
                self.pool[key.removeprefix("pool.")] = pool
