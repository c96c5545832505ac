"""Images in one NumPy file."""

from __future__ import annotations

import functools
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from quire.data import expand
from quire.datasets.images import RAW, Digits, Size, plain_sizes
from quire.datasets.pixels import Pixels, channels_first, check_channels, pair
from quire.datasets.splits import TrainTest, random_split, stratified_split
from quire.errors import ConfigError, DataError


class NpzImages(TrainTest):
    """Images in one NumPy .npz file, as bytes, floats in [0,1], or packed bits.

    Fields: image [B,C,H,W] float in [0,1], label [B] where ``label_key`` is given.

    Args:
        path: The file, or a folder that holds one .npz; ``$QUIRE_DATA`` and ``~`` are expanded.
        image_key: Array [N,H,W], [N,H,W,C] or [N,C,H,W]; with ``packed`` the bits as ``numpy.packbits`` gives them.
        label_key: Array [N] of integers from 0, or of strings; null for none.
        packed: Height and width in pixels of a packed image; null when the bits aren't packed.
        size: Height and width in pixels to resize to (bilinear); null keeps the file's.
        channels: 1 (grey) or 3 (RGB); null keeps the file's.
        split: ``"stratified"`` over the classes (plain when there are none) or ``"random"``; both seeded 0.
        test_fraction: Share of the samples held out, in (0, 1).
        **kwargs: Arguments of ``TrainTest`` (``val_samples``) and ``DataModule``.

    Raises:
        ConfigError: no such file or key (the keys are listed), or ``packed`` that doesn't fit the rows.
        DataError: a broken file, shapes that aren't images, values outside [0,1], or labels that don't match.
    """

    fields: ClassVar[tuple[str, ...]] = ("image", "label", "index")

    def __init__(
        self,
        path: str,
        image_key: str = "images",
        label_key: str | None = "labels",
        packed: list[int] | None = None,
        size: Size = None,
        channels: int | None = None,
        split: Literal["stratified", "random"] = "stratified",
        test_fraction: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if split not in ("random", "stratified"):
            raise ConfigError(f"data.split must be random or stratified, got {split!r}")
        if not 0 < test_fraction < 1:
            raise ConfigError(f"data.test_fraction must be in (0, 1), got {test_fraction}")
        self.path, self.image_key, self.label_key = expand(path), image_key, label_key
        self.packed, self.size = pair(packed, "data.packed"), pair(size, "data.size")
        self.channels, self.how, self.test_fraction = check_channels(channels), split, test_fraction
        if not label_key:
            self.fields = ("image", "index")  # type: ignore[misc]

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A hundred digits, written to a temporary file."""
        data = Digits().part("train").tensors  # type: ignore[attr-defined]
        file = Path(tempfile.mkdtemp()) / "digits.npz"
        np.savez(file, images=(data["image"][:100, 0] * 255).byte().numpy(), labels=data["label"][:100].numpy())
        given = {"path": str(file), "batch_size": 16}
        return {"model": RAW, "data": {"class_path": "NpzImages", "init_args": given}}

    @functools.cached_property
    def _whole(self) -> Pixels:
        arrays = _npz(self.path, [k for k in (self.image_key, self.label_key) if k])
        images = _as_images(arrays[0], self.packed, f"{self.path}: {self.image_key}")
        fields = {"image": images}
        if self.label_key:
            labels = arrays[1]
            if (
                labels.shape != (len(images),)
                or labels.dtype.kind not in "iuUS"
                or (labels.dtype.kind in "iu" and labels.min() < 0)
            ):
                raise DataError(
                    f"{self.path}: {self.label_key} must hold {len(images)} integers from 0 or strings, got "
                    f"{labels.dtype} {list(labels.shape)}"
                )
            numbers = np.unique(labels, return_inverse=True)[1] if labels.dtype.kind in "US" else labels
            fields["label"] = torch.from_numpy(numbers.astype(np.int64))
        return Pixels(self.size, self.channels, **fields)

    def load(self, part: str) -> Pixels:
        """One part, in memory."""
        whole = self._whole
        held = min(max(1, round(len(whole) * self.test_fraction)), len(whole) - 1)
        labels = whole.tensors.get("label") if self.how == "stratified" else None
        chosen = random_split(len(whole), held) if labels is None else stratified_split(labels, held)
        return whole.take(chosen[part == "test"])

    def sizes(self) -> dict[str, Any]:
        """image_size, channels, and classes where there are labels."""
        labels = self._whole.tensors.get("label")
        return plain_sizes(self._whole[0]["image"], None if labels is None else int(labels.max()) + 1)


def _npz(path: Path, keys: Sequence[str]) -> list[np.ndarray]:
    inside = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if len(inside) != 1 or not inside[0].is_file():
        raise ConfigError(f"data.path: {path} is no .npz file and no folder with exactly one")
    try:
        with np.load(inside[0], allow_pickle=False) as content:
            for key in keys:
                if key not in content.files:
                    raise ConfigError(f"{inside[0]} has no array {key!r}; it has {', '.join(content.files)}")
            return [content[key] for key in keys]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, ConfigError):
            raise
        raise DataError(f"{inside[0]} is truncated or no .npz of plain arrays: replace it") from error


def _as_images(array: np.ndarray, packed: tuple[int, int] | None, where: str) -> Tensor:
    if packed is not None:
        count = packed[0] * packed[1]
        if array.ndim != 2 or array.dtype != np.uint8 or array.shape[1] != (count + 7) // 8:
            raise ConfigError(
                f"{where} is {array.dtype} {list(array.shape)}; packed {packed[0]}x{packed[1]} needs uint8 "
                f"[N, {(count + 7) // 8}]: change data.packed"
            )
        array = np.unpackbits(array, axis=1)[:, :count].reshape(-1, *packed) * np.uint8(255)
    if array.ndim not in (3, 4) or (array.ndim == 4 and not {array.shape[1], array.shape[-1]} & {1, 3}):
        raise DataError(f"{where} has shape {list(array.shape)}; images are [N,H,W], [N,H,W,C] or [N,C,H,W]")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype != np.uint8:
        if array.dtype.kind != "f" or not (array.min() >= 0 and array.max() <= 1):
            raise DataError(
                f"{where} is {array.dtype} in {array.min()}..{array.max()}; store bytes, or floats in [0,1]"
            )
        array = array.astype(np.float32)
    return channels_first(array)
