"""State too large for a checkpoint: a safetensors file beside it, with its hash inside the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file

from quire.checkpoint import WholeFiles, fingerprint
from quire.datasets.activations.buffer import Chunk
from quire.datasets.activations.shards import write_whole
from quire.errors import DataError

KEY = "beside"
"""Key of a data module's state whose tensors go into the other file."""


class BesideFiles(WholeFiles):
    """Writes the large tensors of a data module's state beside the checkpoint, before the checkpoint itself.

    The other file is named by its own hash, so a kill between the two leaves the old pair whole; it goes when its
    checkpoint goes.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Rows first, then the checkpoint, then what no checkpoint of this name needs any more."""
        target = Path(path)
        written = None
        for name, state in list(checkpoint.items()):
            if isinstance(state, dict) and KEY in state:
                rows = state[KEY]
                state = {k: v for k, v in state.items() if k != KEY}
                if rows:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    state["rows"] = written = _write(rows, target)
                checkpoint = {**checkpoint, name: state}
        super().save_checkpoint(checkpoint, path, storage_options)
        for file in _of(target):
            if written is None or file.name != written["name"]:
                file.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in Lightning, and where the rows lie."""
        checkpoint: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        for state in checkpoint.values():
            if isinstance(state, dict) and isinstance(state.get("rows"), dict) and "sha256" in state["rows"]:
                state["rows"]["checkpoint"] = str(path)
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        """Both files."""
        super().remove_checkpoint(path)
        for file in _of(Path(path)):
            file.unlink(missing_ok=True)


def _of(target: Path) -> list[Path]:
    return [f for f in target.parent.glob("*.rows.safetensors") if f.name.rsplit(".", 3)[0] == target.stem]


def _write(rows: Chunk, target: Path) -> dict[str, str]:
    part = target.with_name(f"{target.stem}.new.rows.safetensors")
    write_whole({k: v.detach().cpu() for k, v in rows.items()}, part, {"of": target.name})
    digest = fingerprint(part)
    final = target.with_name(f"{target.stem}.{digest[:12]}.rows.safetensors")
    part.replace(final)
    return {"name": final.name, "sha256": digest}


def read_rows(said: dict[str, str]) -> Chunk:
    """The rows that belong to a checkpoint that ``BesideFiles`` has read.

    Raises:
        DataError: the file is gone, cut short, or another one.
    """
    checkpoint = said["checkpoint"]
    file = Path(checkpoint).resolve().parent / said["name"]
    if not file.is_file():
        raise DataError(f"{checkpoint} needs the buffer's rows, {said['name']}, beside it: the file is gone")
    if fingerprint(file) != said["sha256"]:
        raise DataError(f"{file} is not the one that {checkpoint} was written with: its hash differs")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file} is broken: {error}") from error


def write_beside(trainer: Any) -> bool:
    """Give a Trainer ``BesideFiles``; False when its strategy has a writer of its own, which then gets the rows."""
    if type(trainer.strategy.checkpoint_io) in (TorchCheckpointIO, WholeFiles):
        trainer.strategy.checkpoint_io = BesideFiles()
    return isinstance(trainer.strategy.checkpoint_io, BesideFiles)
