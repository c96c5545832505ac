"""Pixels from files and arrays: grey or RGB, sizes, crops; float in [0,1] at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from quire.contracts import Batch
from quire.data import Fields, mix
from quire.errors import ConfigError, DataError

GREY = (0.299, 0.587, 0.114)  # luma weights of ITU-R BT.601


def pair(size: int | Sequence[int] | None, asker: str) -> tuple[int, int] | None:
    """``size`` as (height, width). Raises ``ConfigError`` when it isn't one or two positive numbers."""
    if size is None:
        return None
    both = (size, size) if isinstance(size, int) else tuple(size)
    if len(both) != 2 or min(both) < 1:
        raise ConfigError(f"{asker} must be one or two positive numbers of pixels, got {size}")
    return int(both[0]), int(both[1])


def check_channels(channels: int | None) -> int | None:
    """``channels`` if it is 1, 3 or None, else ``ConfigError``."""
    if channels not in (None, 1, 3):
        raise ConfigError(f"data.channels must be 1 (grey) or 3 (RGB), got {channels}")
    return channels


def finish(image: Tensor, size: tuple[int, int] | None = None, channels: int | None = None) -> Tensor:
    """[...,C,H,W] bytes or floats → floats in [0,1] of that size (bilinear, antialiased) and number of channels."""
    image = image.float().div(255) if image.dtype == torch.uint8 else image.float()
    if channels is not None and channels != image.shape[-3]:
        if channels == 1:
            image = (image * image.new_tensor(GREY)[:, None, None]).sum(-3, keepdim=True)
        else:
            image = image.expand(*image.shape[:-3], channels, *image.shape[-2:])
    if size is not None and tuple(image.shape[-2:]) != size:
        flat = image.reshape(-1, *image.shape[-3:])
        flat = interpolate(flat, size, mode="bilinear", antialias=True, align_corners=False)
        image = flat.reshape(*image.shape[:-2], *size).clamp(0, 1)
    return image


def read_image(file: Path, channels: int) -> Tensor:
    """One image file as bytes [C,H,W]. Raises ``DataError`` naming a file that can't be read."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{file} has {image.mode} pixels of more than 8 bits: convert it to 8 bits")
            pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"{file} can't be read as an image ({error}): replace it, or set data.corrupt: skip") from error
    return torch.from_numpy(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1).copy())


def crop_shorter(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Scaled until it just covers ``size``, then the middle of it; [C,H,W]."""
    height, width = image.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    image = finish(image, (max(size[0], round(height * scale)), max(size[1], round(width * scale))))
    top, left = (image.shape[-2] - size[0]) // 2, (image.shape[-1] - size[1]) // 2
    return image[..., top : top + size[0], left : left + size[1]]


def crop_random(image: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A crop of ``size`` at a random place; [C,H,W]."""
    top, left = (
        int(torch.randint(have - want + 1, (), generator=generator)) for have, want in zip(image.shape[-2:], size)
    )
    return image[..., top : top + size[0], left : left + size[1]]


def channels_first(images: np.ndarray | Tensor) -> Tensor:
    """[N,H,W], [N,H,W,C] or [N,C,H,W] → [N,C,H,W]."""
    held = torch.as_tensor(images)
    if held.ndim == 3:
        return held[:, None]
    return held.permute(0, 3, 1, 2).contiguous() if held.shape[-1] in (1, 3) else held


class Pixels(Fields):
    """In-memory images kept as bytes; a batch is made float, resized and recoloured when it is fetched."""

    def __init__(self, size: tuple[int, int] | None, channels: int | None, **tensors: Tensor) -> None:
        super().__init__(**tensors)
        self.size, self.channels = size, channels

    def __getitem__(self, i: int) -> Batch:
        sample = super().__getitem__(i)
        return {**sample, "image": finish(sample["image"], self.size, self.channels)}

    def __getitems__(self, indices: list[int]) -> Batch:
        batch = super().__getitems__(indices)
        return {**batch, "image": finish(batch["image"], self.size, self.channels)}

    def take(self, indices: Tensor) -> Pixels:
        """Some of the samples."""
        return Pixels(self.size, self.channels, **{k: v[indices] for k, v in self.tensors.items()})


class Source:
    """Images that are read one by one. Subclass it and write ``read``.

    Args:
        names: What each image is called in messages: file names.
        labels: One class each, where they are known without reading.
    """

    def __init__(self, names: Sequence[object], labels: Tensor | None = None) -> None:
        self.names, self.labels = names, labels

    def read(self, i: int) -> tuple[Tensor, int | None]:
        """Image ``i`` [C,H,W] as bytes or floats, and its class if it has one."""
        raise NotImplementedError


class Files(Source):
    """Image files. Args as ``Source``; ``channels`` is 1 or 3."""

    def __init__(self, files: Sequence[Path], labels: Tensor | None, channels: int) -> None:
        super().__init__(files, labels)
        self.files, self.channels = files, channels

    def read(self, i: int) -> tuple[Tensor, int | None]:
        """One file, decoded."""
        return read_image(self.files[i], self.channels), None if self.labels is None else int(self.labels[i])


class Pictures(Dataset):
    """Samples read, or cut out of images, one by one.

    Args:
        source: Where images come from.
        size: Height and width of a sample in pixels; None takes images as they are.
        channels: 1 or 3.
        fit: ``"crop"`` scales and takes the middle, ``"stretch"`` ignores the aspect, ``"random"`` cuts at random.
        scale: Factor on both sides before anything is cut.
        seed: Seed of random cuts, which depend on (seed, epoch, place in the set) alone.
        fresh: Whether random cuts change from epoch to epoch.
        places: The images in use, repeated where several samples come from one; default each once.
    """

    epoch = 0

    def __init__(
        self,
        source: Source,
        size: tuple[int, int] | None,
        channels: int,
        fit: str = "crop",
        scale: float = 1.0,
        seed: int = 0,
        fresh: bool = False,
        places: Tensor | None = None,
    ) -> None:
        self.source, self.size, self.channels, self.fit, self.scale = source, size, channels, fit, scale
        self.seed, self.fresh = seed, fresh
        self.places = torch.arange(len(source.names)) if places is None else places

    def __len__(self) -> int:
        return len(self.places)

    @property
    def labels(self) -> Tensor | None:
        """One class a sample, where they are known without reading."""
        return None if self.source.labels is None else self.source.labels[self.places]

    def __getitem__(self, i: int) -> Batch:
        place = int(self.places[i])
        image, label = self.source.read(place)
        image = finish(image, None, self.channels)
        if self.scale != 1:
            image = finish(image, (round(image.shape[-2] * self.scale), round(image.shape[-1] * self.scale)))
        sample: Batch = {"image": self._fitted(image, i, place)}
        return sample if label is None else {**sample, "label": torch.tensor(label)}

    def _fitted(self, image: Tensor, i: int, place: int) -> Tensor:
        if self.size is None:
            return image
        if self.fit == "crop":
            return crop_shorter(image, self.size)
        if self.fit == "stretch":
            return finish(image, self.size)
        (height, width), (h, w) = image.shape[-2:], self.size
        if height < h or width < w:
            name = self.source.names[place]
            raise ConfigError(f"{name} offers {height}x{width} pixels, too few for crops of {h}x{w}: lower data.size")
        key = mix(self.seed, self.epoch if self.fresh else 0, i)
        return crop_random(image, self.size, torch.Generator().manual_seed(key))

    def take(self, indices: Tensor) -> Pictures:
        """The samples at ``indices``; an index may come more than once."""
        return Pictures(
            self.source, self.size, self.channels, self.fit, self.scale, self.seed, self.fresh, self.places[indices]
        )
