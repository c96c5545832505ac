"""IDX files, the layout of MNIST and its relatives, raw or gzipped; torchvision isn't needed to read them."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from quire.errors import ConfigError, DataError

PREFIX = {"train": "train", "test": "t10k"}


def find_idx(root: Path, name: str, part: str) -> tuple[Path, Path] | None:
    """Image and label file of ``part`` in ``root``, ``raw/``, ``NAME/raw/`` or ``NAME/``; None if neither is there.

    Raises:
        ConfigError: one of the two files is missing.
    """
    for folder in (root, root / "raw", root / name / "raw", root / name):
        stems = [f"{PREFIX[part]}-images-idx3-ubyte", f"{PREFIX[part]}-labels-idx1-ubyte"]
        found = [next((f for f in (folder / s, folder / f"{s}.gz") if f.is_file()), None) for s in stems]
        if any(found):
            for stem, file in zip(stems, found):
                if file is None:
                    raise ConfigError(f"{folder} has no {stem} (or {stem}.gz): put it there, or change data.root")
            return found[0], found[1]  # type: ignore[return-value]
    return None


def read_idx(file: Path) -> Tensor:
    """One IDX file of unsigned bytes. Raises ``DataError`` naming the file when it is broken."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} is truncated or not readable: fetch it again") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise DataError(f"{file} is not an IDX file of bytes: fetch it again")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(f"{file} is truncated: its header ends after {len(content)} bytes; fetch it again")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{file} is truncated or too long: {len(content) - start} bytes of {math.prod(shape)}; fetch it again"
        )
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).reshape(shape)


def read_pair(images: Path, labels: Path) -> tuple[Tensor, Tensor]:
    """Images uint8 [N,1,H,W] and labels int64 [N]. Raises ``DataError`` when their counts differ."""
    pixels, classes = read_idx(images), read_idx(labels)
    if len(pixels) != len(classes):
        raise DataError(f"{images} has {len(pixels)} images and {labels.name} has {len(classes)} labels")
    return pixels[:, None], classes.long()
