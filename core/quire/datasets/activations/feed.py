"""Loaders of activation rows: mixed for training, in order for evaluation, whole samples for analysis."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch

from quire.contracts import Batch
from quire.data import mix
from quire.datasets.activations.buffer import Buffer, Chunk


class Chunks(Protocol):
    """Where rows come from: forward passes of a subject, or pieces of a harvested folder."""

    def plan(self, epoch: int, shuffle: bool, rank: int = 0, world: int = 1) -> list[Any]:
        """The chunks of one epoch, in order."""

    def fed(self, plan: list[Any]) -> int:
        """Rows that they hold, known without reading them."""

    def read(self, what: Any) -> Chunk:
        """The rows of one chunk."""


Finish = Callable[[Chunk], Batch]


class Feed:
    """Training batches through the mixing buffer; its place is kept to the row.

    Args:
        chunks: Where rows come from.
        batch_size: Rows a batch.
        buffer: Most rows in the buffer.
        keep: Share of the buffer that stays at each refill.
        seed: Of order and shuffles.
        finish: Rows as they are kept → the batch.
        rank: Of this process.
        world: Processes.
        epoch: Tells the number of the epoch that starts.
        device: Where restored rows go.
    """

    def __init__(
        self,
        chunks: Chunks,
        batch_size: int,
        buffer: int,
        keep: float,
        seed: int,
        finish: Finish,
        rank: int = 0,
        world: int = 1,
        epoch: Callable[[], int] | None = None,
        device: Callable[[], torch.device] | None = None,
    ) -> None:
        self.chunks, self.batch_size, self.seed, self.finish = chunks, batch_size, seed, finish
        self.rank, self.world = rank, world
        self.capacity, self.keep = buffer, keep
        self._tell, self._device = epoch, device
        self.epoch, self.read, self.seen = -1, 0, 0
        self.buffer: Buffer | None = None
        self._plan: list[Any] = []
        self._taken_up = False
        self._known: tuple[int, int] | None = None
        Buffer(buffer, batch_size, keep, 0)  # refuses wrong sizes now, not in the first epoch

    def __len__(self) -> int:
        return self._most(max(self.epoch, 0))

    def _most(self, epoch: int) -> int:
        """Batches of one epoch, the same on every rank."""
        if self._known is None or self._known[0] != epoch:
            rows = [self.chunks.fed(self.chunks.plan(epoch, True, r, self.world)) for r in range(self.world)]
            self._known = epoch, min(rows) // self.batch_size
        return self._known[1]

    def __iter__(self) -> Iterator[Batch]:
        if self._taken_up:
            self._taken_up = False
        else:
            self._begin(self.epoch + 1 if self._tell is None else self._tell())
        assert self.buffer is not None
        most = len(self)
        while self.seen < most and (rows := self.buffer.next(self._pull)) is not None:
            self.seen += 1
            yield self.finish(rows)

    def _begin(self, epoch: int) -> None:
        self.epoch, self.read, self.seen = epoch, 0, 0
        self._plan = self.chunks.plan(epoch, True, self.rank, self.world)
        self.buffer = self._new(epoch)

    def _new(self, epoch: int) -> Buffer:
        size = max(self.batch_size, min(self.capacity, self.chunks.fed(self._plan)))
        return Buffer(size, self.batch_size, self.keep, mix(self.seed, 3, epoch, self.rank))

    def _pull(self) -> Chunk | None:
        if self.read >= len(self._plan):
            return None
        chunk = self.chunks.read(self._plan[self.read])
        self.read += 1
        return chunk

    # ---- resume
    def state(self) -> tuple[dict[str, Any], Chunk]:
        """The place in the source and the buffer's state, and the buffer's rows."""
        place = {"epoch": self.epoch, "read": self.read, "seen": self.seen}
        if self.buffer is None or self.seen >= len(self):
            return {**place, "buffer": None}, {}
        plain, rows = self.buffer.state()
        return {**place, "buffer": plain}, rows

    def restore(self, place: Mapping[str, Any], rows: Chunk) -> None:
        """Go on behind the batches that were handed out; a finished epoch starts a new one."""
        if place["buffer"] is None:
            self.epoch = place["epoch"]
            return
        self._begin(place["epoch"])
        self.read, self.seen = place["read"], place["seen"]
        assert self.buffer is not None
        self.buffer.restore(place["buffer"], rows, torch.device("cpu") if self._device is None else self._device())
        self._taken_up = True

    def state_dict(self) -> dict[str, int]:
        """Batches handed out; the data module keeps the rest."""
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Nothing: the data module restores the place."""


class InOrder:
    """Every row of a split in the source's order; the last batch may be short.

    Args:
        chunks: Where rows come from.
        batch_size: Rows a batch.
        finish: Rows as they are kept → the batch.
        rank: Of this process.
        world: Processes.
    """

    def __init__(self, chunks: Chunks, batch_size: int, finish: Finish, rank: int = 0, world: int = 1) -> None:
        self.chunks, self.batch_size, self.finish = chunks, batch_size, finish
        self.plan = chunks.plan(0, False, rank, world)

    def __len__(self) -> int:
        return -(-self.chunks.fed(self.plan) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        held: list[Chunk] = []
        count = 0
        for what in self.plan:
            chunk = self.chunks.read(what)
            held.append(chunk)
            count += len(chunk["activation"])
            while count >= self.batch_size:
                rows = _joined(held)
                yield self.finish({k: v[: self.batch_size] for k, v in rows.items()})
                held = [{k: v[self.batch_size :] for k, v in rows.items()}]
                count -= self.batch_size
        if count:
            yield self.finish(_joined(held))


def _joined(chunks: list[Chunk]) -> Chunk:
    return chunks[0] if len(chunks) == 1 else {k: torch.cat([c[k] for c in chunks]) for k in chunks[0]}


class Samples:
    """Whole samples [B,T,·], for analysis; the place in the epoch is kept.

    Args:
        plan: Epoch → indices of each batch.
        read: Indices → batch.
        epoch: Tells the number of the epoch that starts.
    """

    def __init__(
        self,
        plan: Callable[[int], list[list[int]]],
        read: Callable[[list[int]], Batch],
        epoch: Callable[[], int] | None = None,
    ) -> None:
        self.plan, self.read, self._tell = plan, read, epoch
        self._seen = self._skip = 0

    def __len__(self) -> int:
        return len(self.plan(0))

    def __iter__(self) -> Iterator[Batch]:
        self._seen, self._skip = self._skip, 0
        for indices in self.plan(0 if self._tell is None else self._tell())[self._seen :]:
            self._seen += 1
            yield self.read(indices)

    def state_dict(self) -> dict[str, int]:
        """Batches handed out in this epoch."""
        return {"seen": self._seen}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Start behind them; a finished epoch starts anew."""
        self._skip = state["seen"] if state["seen"] < len(self) else 0


def as_batch(rows: Chunk, sites: list[str], widths: list[int]) -> Batch:
    """Rows as they are kept → the batch: fp32, wide integers, and several sites apart.

    With several sites ``activation`` is the first one's, each has its own ``activation@SITE``, and where they are
    equally wide ``states`` [N,S,D] holds all (``grad`` likewise).
    """
    batch: Batch = {}
    for name, values in rows.items():
        batch[name] = values.float() if values.is_floating_point() else values
        if values.dtype in (torch.int32, torch.int16, torch.uint8):
            batch[name] = values.long()
    if len(sites) > 1:
        for name, together in (("activation", "states"), ("grad", "grads")):
            if name in batch:
                parts = batch[name].split(widths, -1)
                batch |= {f"{name}@{site}": part for site, part in zip(sites, parts)}
                if len(set(widths)) == 1:
                    batch[together] = batch[name].unflatten(-1, (len(sites), -1))
                batch[name] = parts[0]
    return batch
