"""A harvested folder: safetensors shards under a header that says what they are; complete shards only."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quire.data import mix
from quire.datasets.activations.buffer import Chunk
from quire.errors import ConfigError, DataError

FORMAT = 1
HEADER = "header.json"
NARROW = {"token": torch.int32, "position": torch.int32, "instance": torch.int32, "head": torch.int16}
PIECE = 16384
"""Rows that are read from a shard at a time."""


class Writer:
    """Writes one rank's shards; each holds whole forward passes, and is renamed into its place when it is complete.

    Args:
        folder: Where to.
        rank: Of this process.
        rows: A shard is closed when it has this many.
        prefix: Of the files' names.
    """

    def __init__(self, folder: Path, rank: int, rows: int, prefix: str = "part") -> None:
        self.folder, self.rank, self.rows, self.prefix = folder, rank, rows, prefix
        for left in folder.glob(f".{prefix}-r{rank:03}-*.part"):  # what a kill left behind
            left.unlink()
        self.done = shards_of(folder, rank, prefix)
        self.next = int(self.done[-1][1]["stop"]) if self.done else 0
        self._held: list[Chunk] = []
        self._count, self._since = 0, self.next

    def add(self, chunk: Chunk) -> None:
        """The rows of the next forward pass."""
        self._held.append({k: v.to(NARROW.get(k, v.dtype)).cpu() for k, v in chunk.items()})
        self._count += len(next(iter(chunk.values())))
        self.next += 1
        if self._count >= self.rows:
            self.close()

    def close(self) -> None:
        """Write what is held. Raises ``DataError`` when the disk is full; shards that are complete stay."""
        if self.next == self._since:
            return
        tensors = {k: torch.cat([c[k] for c in self._held]) for k in self._held[0]} if self._held else {}
        said = {"start": str(self._since), "stop": str(self.next), "rows": str(self._count)}
        target = self.folder / f"{self.prefix}-r{self.rank:03}-{len(self.done):06}.safetensors"
        write_whole(tensors, target, said)
        self.done.append((target, said))
        self._held, self._count, self._since = [], 0, self.next


def write_whole(tensors: Chunk, target: Path, said: dict[str, str]) -> None:
    """Write beside the place, flush to the disk, rename.

    Raises:
        DataError: no space is left.
    """
    part = target.with_name(f".{target.name.removesuffix('.safetensors')}.part")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, part, said)
        with part.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(part, target)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise DataError(
                f"no space is left for {target}: what was complete before is kept; free some space and run the same"
                " command again"
            ) from error
        raise


def shards_of(folder: Path, rank: int | None = None, prefix: str = "part") -> list[tuple[Path, dict[str, str]]]:
    """Complete shards with what they say, in order.

    Raises:
        DataError: a shard that is cut short or broken.
    """
    which = "*" if rank is None else f"{rank:03}"
    found = []
    for file in sorted(folder.glob(f"{prefix}-r{which}-*.safetensors")):
        try:
            with safe_open(file, "pt") as handle:
                found.append((file, handle.metadata() or {}))
        except (SafetensorError, OSError) as error:
            raise DataError(f"{file} is cut short or broken ({error}): delete it and harvest again") from error
    return found


def write_header(folder: Path, header: dict[str, Any]) -> None:
    """Write ``header.json`` whole."""
    part = folder / f".{HEADER}.part"
    part.write_text(json.dumps(header, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, folder / HEADER)


def read_header(folder: Path) -> dict[str, Any]:
    """What a folder holds.

    Raises:
        ConfigError: no harvested folder.
    """
    try:
        header: dict[str, Any] = json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{folder} is not a harvested folder: it has no readable {HEADER}") from error
    if header.get("format") != FORMAT:
        raise ConfigError(f"{folder} has format {header.get('format')}; this Quire reads {FORMAT}: harvest again")
    return header


SAYS = {
    "subject": "data.subject",
    "fingerprint": "data.subject (its weights)",
    "encoder": "--codes (its encoder's weights)",
    "site": "data.site",
    "dtype": "data.dtype",
    "tokenizer": "the tokenizer",
    "with_grad": "data.with_grad",
    "drop_special": "data.drop_special",
    "target_site": "data.target_site",
    "source": "data.source",
    "world": "the number of processes",
    "split": "the split",
}


def compare(folder: Path, header: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ``ConfigError`` for the first thing that a folder holds otherwise than it is wanted."""
    for key, value in wanted.items():
        if key in header and header[key] != value:
            said = SAYS.get(key, f"data.{key}")
            raise ConfigError(
                f"{folder} was harvested with {said} {header[key]}, not {value}: make them agree, or harvest into"
                " another folder"
            )


class Shards:
    """Chunks of rows from a harvested folder.

    Args:
        folder: A folder that ``quire harvest`` has finished.
        seed: Of the order of pieces.

    Raises:
        ConfigError: no harvested folder.
        DataError: an unfinished one, or a broken shard.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.header = read_header(folder)
        self.files = [(file, int(said["rows"])) for file, said in shards_of(folder) if int(said.get("rows", 0))]
        have, whole = sum(rows for _, rows in self.files), self.header.get("rows")
        if not self.header.get("complete"):
            raise DataError(f"{folder} is not finished ({have} rows so far): run the same quire harvest again")
        if have != whole:
            raise DataError(f"{folder} should hold {whole} rows and holds {have}: a shard is missing; harvest again")

    def plan(self, epoch: int, shuffle: bool, rank: int = 0, world: int = 1) -> list[tuple[str, int, int]]:
        """Pieces (file, first row, row behind the last); in training in a seeded order."""
        pieces = [
            (str(file), start, min(start + PIECE, rows)) for file, rows in self.files for start in range(0, rows, PIECE)
        ]
        if shuffle:
            key = torch.Generator().manual_seed(mix(self.seed, 4, epoch))
            pieces = [pieces[i] for i in torch.randperm(len(pieces), generator=key).tolist()]
        return pieces[rank::world]

    def fed(self, plan: list[tuple[str, int, int]]) -> int:
        """Rows of a plan."""
        return sum(stop - start for _, start, stop in plan)

    def read(self, what: tuple[str, int, int]) -> Chunk:
        """One piece.

        Raises:
            DataError: a shard that is gone or broken.
        """
        file, start, stop = what
        try:
            with safe_open(file, "pt") as handle:
                return {k: _slice(handle, k, start, stop) for k in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DataError(f"{file} can't be read ({error}): harvest again") from error


def _slice(handle: Any, name: str, start: int, stop: int) -> Tensor:
    values: Tensor = handle.get_slice(name)[start:stop]
    return values
