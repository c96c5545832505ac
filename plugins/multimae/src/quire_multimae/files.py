"""One file of one modality: pictures, 16-bit or float depth, maps of class ids. Layout after Bachmann et al. 2022."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from quire.datasets.pixels import read_image
from quire.errors import ConfigError, DataError

KINDS = ("rgb", "grey", "depth", "classes")


def kind_of(name: str, said: str) -> tuple[str, int]:
    """``rgb``, ``grey``, ``depth`` or ``classes:N`` as (kind, N). Raises ``ConfigError`` for another word."""
    kind, _, number = said.partition(":")
    if kind not in KINDS or (kind == "classes") != number.isdigit():
        raise ConfigError(f"modality {name} is {said!r}; it must be rgb, grey, depth or classes:N, classes:133 for one")
    return kind, int(number or 0)


def read(file: Path, kind: str) -> Tensor:
    """A file as float [C,H,W] (pictures in [0,1], depth as stored; 16-bit depth divided by 2^16) or int64 [H,W].

    Raises:
        DataError: a file that can't be read, or that isn't of this kind.
    """
    if kind in ("rgb", "grey"):
        return read_image(file, 3 if kind == "rgb" else 1).float() / 255
    values = _array(file)
    if values.ndim != 2:
        raise DataError(f"{file} has shape {list(values.shape)}; a {kind} file has one number a pixel")
    if kind == "classes":
        if not np.issubdtype(values.dtype, np.integer):
            raise DataError(f"{file} holds {values.dtype}; a class map holds integers")
        return torch.from_numpy(values.astype(np.int64))
    scale = {"uint8": 2.0**8, "uint16": 2.0**16, "int32": 2.0**16}.get(str(values.dtype), 1.0)
    return torch.from_numpy(values.astype(np.float32))[None] / scale


def _array(file: Path) -> np.ndarray:
    try:
        if file.suffix in (".npy", ".npz"):
            found = np.load(file, allow_pickle=False)
            return found[found.files[0]] if file.suffix == ".npz" else found
        with Image.open(file) as image:
            return np.array(image)
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise DataError(f"{file} can't be read ({error}): replace it, or set data.corrupt: skip") from error


def fit(value: Tensor, size: tuple[int, int], whole: bool) -> Tensor:
    """Scale until it covers ``size`` and take the middle: ids and depth with holes by the nearest, others smoothly.

    Args:
        value: [C,H,W] float or [H,W] int64.
        size: Height and width of the result.
        whole: Whether every value may be mixed with its neighbours.
    """
    flat = value[None] if value.is_floating_point() else value[None, None].double()
    height, width = flat.shape[-2:]
    if (height, width) != size:
        scale = max(size[0] / height, size[1] / width)
        cover = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
        smooth = {"mode": "bilinear", "antialias": True, "align_corners": False}
        flat = interpolate(flat, cover, **(smooth if whole else {"mode": "nearest-exact"}))  # type: ignore[arg-type]
        top, left = (cover[0] - size[0]) // 2, (cover[1] - size[1]) // 2
        flat = flat[..., top : top + size[0], left : left + size[1]]
    return flat[0].contiguous() if value.is_floating_point() else flat[0, 0].long()


def write(file: Path, value: Tensor) -> None:
    """A field as a file: float [1,H,W] in [0,1] as 16-bit PNG, [3,H,W] as RGB, int64 ids below 256 as 8-bit PNG.

    Raises:
        DataError: numbers outside [0,1], or ids above 255.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if value.is_floating_point():
        if not (bool(torch.isfinite(value).all()) and float(value.min()) >= 0 and float(value.max()) <= 1):
            raise DataError(f"{file}: what is written must be finite and in [0,1]; scale it first")
        if len(value) == 3:
            Image.fromarray((value * 255).round().byte().permute(1, 2, 0).numpy()).save(file)
            return
        Image.fromarray((value[0] * 65535).round().numpy().astype(np.uint16)).save(file)
        return
    if int(value.max()) > 255 or int(value.min()) < 0:
        raise DataError(f"{file}: ids must be in 0..255, found {int(value.min())}..{int(value.max())}")
    Image.fromarray(value.numpy().astype(np.uint8)).save(file)
