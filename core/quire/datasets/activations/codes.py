"""Codes on disk: where each latent fired and how strongly, by latent; rows as a sparse matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from scipy import sparse
from torch import Tensor

from quire.contracts import Batch
from quire.data import expand
from quire.datasets.activations.buffer import Chunk
from quire.datasets.activations.shards import FORMAT, Writer, read_header, shards_of, write_header, write_whole
from quire.errors import ConfigError, DataError

SHARDS = 5
TOKENS = "tokens.safetensors"


@dataclass
class Fired:
    """Where one latent fired, in the order of rows and positions.

    Attributes:
        rows: [n] int64, instance.
        positions: [n] int64.
        activations: [n] fp32, never 0.
    """

    rows: Tensor
    positions: Tensor
    activations: Tensor


class CodeWriter:
    """Writes a CodeStore: runs as they come, sorted by latent when it is finished.

    Args:
        folder: Where to.
        latents: F.
        encoder: Hash of the encoder; another encoder's codes are refused.
        rank: Of this process.
        entries: Firings that are held before they are written.
        fresh: Drop this rank's unfinished runs of an earlier time, which else are gone on with.

    Raises:
        ConfigError: the folder holds codes of another encoder.
    """

    def __init__(
        self,
        folder: Path,
        latents: int,
        encoder: str,
        rank: int = 0,
        entries: int = 4_000_000,
        fresh: bool = False,
    ) -> None:
        self.folder, self.latents, self.encoder = folder, latents, encoder
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "header.json").is_file():
            check_encoder(read_header(folder), encoder, folder)
        elif rank == 0:
            write_header(folder, {"format": FORMAT, "kind": "codes", "latents": latents, "encoder": encoder})
        for old in folder.glob(f"run-r{rank:03}-*.safetensors") if fresh else ():
            old.unlink()
        self.runs = Writer(folder, rank, entries, "run")

    def add(self, codes: Any, batch: Mapping[str, Any]) -> None:
        """Codes of N rows, with ``instance`` and ``position`` [N], and ``token`` and ``special`` where there are."""
        self.runs.add(entries_of(codes, batch))

    def finish(self) -> CodeStore:
        """Sort all runs by latent into shards; then the runs go."""
        self.runs.close()
        return merge(self.folder, {"latents": self.latents, "encoder": self.encoder})


def entries_of(codes: Any, batch: Mapping[str, Any]) -> Chunk:
    """Firings of N rows, and the rows' tokens.

    Args:
        codes: ``values`` and ``indices`` [N,K], or a ``dense()`` [N,F], or a tensor [N,F].
        batch: ``instance`` [N], ``position`` [N]; ``token`` [N], ``special`` [N].
    """
    for name in ("instance", "position"):
        if name not in batch:
            raise ConfigError(f"storing codes needs the field {name}; the batch has {', '.join(batch)}")
    instance, position = batch["instance"], batch["position"]
    values, indices = getattr(codes, "values", None), getattr(codes, "indices", None)
    if isinstance(indices, Tensor) and isinstance(values, Tensor):
        row, column = (values != 0).nonzero(as_tuple=True)
        latent, activation = indices[row, column], values[row, column]
    else:
        dense = codes if isinstance(codes, Tensor) else codes.dense()
        row, latent = dense.nonzero(as_tuple=True)
        activation = dense[row, latent]
    if len(activation) and not bool(torch.isfinite(activation).all()):
        bad = int(instance[row[~torch.isfinite(activation)][0]])
        raise DataError(f"codes of sample {bad} are not finite")
    made = {"latent": latent.int(), "row": instance[row].int(), "at": position[row].int()}
    made["activation"] = activation.detach().float()
    none = torch.full_like(position, -1)
    made |= {"instance": instance.int(), "position": position.int(), "token": batch.get("token", none).int()}
    made["special"] = batch.get("special", torch.zeros_like(position, dtype=torch.bool))
    return {k: v.cpu() for k, v in made.items()}


def merge(folder: Path, said: dict[str, Any]) -> CodeStore:
    """Shards by latent from all ranks' runs."""
    latents = int(said["latents"])
    runs = [load_file(file) for file, _ in shards_of(folder, prefix="run")]
    if not any(len(run["latent"]) for run in runs):
        raise DataError(f"no latent fired in what was stored in {folder}")
    width = -(-latents // SHARDS)
    counts = torch.zeros(latents, dtype=torch.long)
    for number, low in enumerate(range(0, latents, width)):
        high = min(low + width, latents)
        parts: dict[str, list[Tensor]] = {k: [] for k in ("latent", "row", "at", "activation")}
        for run in runs:
            inside = (run["latent"] >= low) & (run["latent"] < high)
            for name, held in parts.items():
                held.append(run[name][inside])
        whole = {k: torch.cat(v) for k, v in parts.items()}
        order = torch.from_numpy(np.lexsort((whole["at"], whole["row"], whole["latent"])))
        whole = {k: v[order] for k, v in whole.items()}
        counts[low:high] = torch.bincount(whole["latent"].long() - low, minlength=high - low)
        start = torch.cat([torch.zeros(1, dtype=torch.long), counts[low:high].cumsum(0)])
        write_whole({"start": start, **whole}, folder / f"latents-{number:03}.safetensors", {"low": str(low)})
    table = {k: torch.cat([run[k] for run in runs]) for k in ("instance", "position", "token", "special")}
    order = torch.from_numpy(np.lexsort((table["position"], table["instance"])))
    write_whole({**{k: v[order] for k, v in table.items()}, "counts": counts}, folder / TOKENS, {})
    header = {"format": FORMAT, "kind": "codes", **said, "shard_width": width, "entries": int(counts.sum())}
    write_header(folder, {**header, "complete": True})
    for file, _ in shards_of(folder, prefix="run"):
        file.unlink()
    return CodeStore(folder)


class CodeStore:
    """Codes of a sparse encoder over a set of rows, read from a folder.

    Args:
        folder: What ``StoreCodes`` or ``quire harvest --codes`` wrote.
        encoder: Hash of the encoder that the codes must come from; None takes any.

    Attributes:
        latents: F.
        encoder: Hash of the encoder.
        counts: [F] int64, firings of each latent.
        instances: [R] int64, the rows, ascending.

    Raises:
        ConfigError: no such store, or another encoder's.
        DataError: a store that was never finished.
    """

    def __init__(self, folder: str | Path, encoder: str | None = None) -> None:
        self.folder = expand(folder)
        header = read_header(self.folder)
        if header.get("kind") != "codes":
            raise ConfigError(f"{self.folder} holds activations, not codes: harvest with --codes CHECKPOINT")
        if encoder is not None:
            check_encoder(header, encoder, self.folder)
        if not header.get("complete"):
            raise DataError(f"the codes in {self.folder} are not finished: run what writes them again")
        self.header, self.latents, self.encoder = header, int(header["latents"]), str(header["encoder"])
        self.table = load_file(self.folder / TOKENS)
        self.counts = self.table["counts"]
        self.instances, self._lengths = self.table["instance"].long().unique_consecutive(return_counts=True)
        self._starts = self._lengths.cumsum(0) - self._lengths
        self._shards: dict[int, Chunk] = {}

    def __len__(self) -> int:
        return len(self.instances)

    def latent(self, latent: int) -> Fired:
        """Where a latent fired. Raises ``ConfigError`` when there is no such latent."""
        if not 0 <= latent < self.latents:
            raise ConfigError(f"latent {latent} is outside 0..{self.latents - 1}")
        number, inside = divmod(latent, int(self.header["shard_width"]))
        shard = self._shard(number)
        one = slice(int(shard["start"][inside]), int(shard["start"][inside + 1]))
        return Fired(shard["row"][one].long(), shard["at"][one].long(), shard["activation"][one])

    def _shard(self, number: int) -> Chunk:
        if number not in self._shards:
            self._shards[number] = load_file(self.folder / f"latents-{number:03}.safetensors")
        return self._shards[number]

    def row(self, instance: int) -> Batch:
        """One row's ``position``, ``token`` and ``special`` [L] in order; -1 where tokens are not known."""
        place = int(torch.searchsorted(self.instances, instance))
        if place >= len(self) or int(self.instances[place]) != instance:
            raise ConfigError(f"row {instance} is not in {self.folder}")
        one = slice(int(self._starts[place]), int(self._starts[place] + self._lengths[place]))
        table = self.table
        return {"position": table["position"][one].long(), "token": table["token"][one].long()} | {
            "special": table["special"][one]
        }

    @cached_property
    def matrix(self) -> Any:
        """CSR [tokens, F] of every stored token, in the order of rows and positions."""
        shards = [self._shard(n) for n in range(-(-self.latents // int(self.header["shard_width"])))]
        entry = {k: torch.cat([s[k] for s in shards]) for k in ("latent", "row", "at", "activation")}
        most = int(self.table["position"].max()) + 1
        key = self.table["instance"].long() * most + self.table["position"].long()
        if len(key.unique()) < len(key):
            raise DataError(f"{self.folder} has tokens twice: store each row once (a heads site has a row per head)")
        token = torch.searchsorted(key, entry["row"].long() * most + entry["at"].long())
        shape = (len(key), self.latents)
        return sparse.csr_matrix((entry["activation"].numpy(), (token.numpy(), entry["latent"].numpy())), shape)

    def dense(self, instance: int) -> Tensor:
        """Codes of one row, [L,F]."""
        self.row(instance)
        place = int(torch.searchsorted(self.instances, instance))
        first = int(self._starts[place])
        return torch.from_numpy(self.matrix[first : first + int(self._lengths[place])].toarray())

    def embeddings(self, pool: str = "mean", skip: Tensor | None = None) -> Any:
        """CSR [R,F]: each row's codes pooled over its tokens, rows as in ``instances``.

        Args:
            pool: ``mean``, ``sum`` or ``max``.
            skip: [tokens] bool, tokens left out, in the order of ``table``; None skips none.

        Raises:
            ConfigError: another word.
            DataError: a row without a token left.
        """
        if pool not in ("mean", "sum", "max"):
            raise ConfigError(f"codes are pooled by mean, sum or max, got {pool!r}")
        keep = np.ones(len(self.table["position"]), dtype=bool) if skip is None else ~skip.numpy()
        owner = np.repeat(np.arange(len(self)), self._lengths.numpy())[keep]
        left = np.bincount(owner, minlength=len(self))
        if (left == 0).any():
            raise DataError(f"sample {int(self.instances[int((left == 0).argmax())])} has no tokens after masking")
        chosen = self.matrix[keep]
        if pool == "max":
            bounds = np.concatenate([[0], left.cumsum()])
            return sparse.vstack([chosen[a:b].max(0) for a, b in pairwise(bounds)]).tocsr()
        weight = 1.0 / left[owner] if pool == "mean" else np.ones(len(owner))
        join = sparse.csr_matrix((weight.astype(np.float32), (owner, np.arange(len(owner)))), (len(self), len(owner)))
        return (join @ chosen).tocsr()


def check_encoder(header: Mapping[str, Any], encoder: str, folder: Path) -> None:
    """Raise ``ConfigError`` when codes come from another encoder."""
    if header.get("encoder") != encoder:
        raise ConfigError(
            f"the codes in {folder} come from another encoder (hash {header.get('encoder')}, not {encoder}):"
            " store into another folder"
        )
