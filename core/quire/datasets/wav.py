"""Mono PCM wav files, with the standard library."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quire.errors import DataError


def read_wav(file: Path) -> tuple[Tensor, int]:
    """(samples [S] in [-1,1], rate in Hz) of a mono PCM file of 8 to 32 bits. Raises ``DataError`` naming the file."""
    try:
        with wave.open(str(file)) as opened:
            channels, width, rate, total = opened.getparams()[:4]
            content = opened.readframes(total)
    except (wave.Error, EOFError, OSError) as error:
        raise DataError(
            f"{file} can't be read as PCM wav ({error or 'it ends early'}): convert or replace it"
        ) from error
    if channels != 1:
        raise DataError(f"{file} has {channels} channels, 1 is expected: mix it down to mono")
    if not total:
        raise DataError(f"{file} is empty: remove it")
    if len(content) != total * width:
        raise DataError(f"{file} is truncated: {len(content) // width} of {total} samples; replace it")
    if width == 1:  # 8 bits are unsigned
        values = np.frombuffer(content, np.uint8).astype(np.float32) - 128
    elif width == 3:
        values = (np.frombuffer(_widened(content), "<i4") >> 8).astype(np.float32)
    else:
        values = np.frombuffer(content, f"<i{width}").astype(np.float32)
    return torch.from_numpy(values / np.float32(2 ** (8 * width - 1))), rate


def _widened(content: bytes) -> bytes:
    wide = np.zeros((len(content) // 3, 4), np.uint8)
    wide[:, 1:] = np.frombuffer(content, np.uint8).reshape(-1, 3)
    return wide.tobytes()


def write_wav(file: Path, sound: Tensor, rate: int) -> None:
    """Write samples [S] in [-1,1] as 16-bit mono PCM."""
    with wave.open(str(file), "wb") as opened:
        opened.setparams((1, 2, rate, 0, "NONE", ""))
        opened.writeframes((sound.clamp(-1, 1) * 32767).round().short().numpy().astype("<i2").tobytes())
