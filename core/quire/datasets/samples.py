"""Photographs that other packages ship: data for generative models without a download."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from quire.data import DataModule
from quire.datasets.pixels import Pictures, Source, check_channels, finish, pair, read_image
from quire.errors import ConfigError

PHOTOS = (  # of scikit-image's samples, those that are photographs or textures
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "grass.png", "gravel.png"),
    *("hubble_deep_field.jpg", "ihc.png", "retina.jpg", "rocket.jpg"),
)
MASKED = {
    "encoder": {"class_path": "ViTEncoder", "init_args": {"patch": 2, "width": 16, "depth": 1, "heads": 2}},
    "decoder": {"class_path": "GridDecoder", "init_args": {"width": 16, "depth": 1, "heads": 2}},
    "objective": "MaskedReconstruction",
}


class SampleImages(DataModule):
    """Crops of the photographs that scikit-learn (2, always there) and scikit-image (11, optional) ship.

    Training crops come from the left three quarters of every photograph, validation from the upper and test from
    the lower half of the right quarter, so no pixel is shared.

    Fields: image [B,C,H,W] float in [0,1].

    Args:
        size: Height and width of a crop in pixels.
        channels: 1 (grey) or 3 (RGB).
        source: ``"sklearn"``, ``"skimage"`` or ``"all"``; the last two need scikit-image.
        scale: Factor on both sides of the photographs before anything is cut.
        length: Crops an epoch; validation and test have a quarter as many, the same in every epoch.
        **kwargs: Arguments of ``DataModule``. Training crops depend on (``seed``, epoch, place) alone.

    Raises:
        ConfigError: scikit-image is missing, or crops larger than a region (the photograph is named).
    """

    fields = ("image", "index")

    def __init__(
        self,
        size: int | list[int] = 32,
        channels: int = 3,
        source: Literal["sklearn", "skimage", "all"] = "sklearn",
        scale: float = 1.0,
        length: int = 1024,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if source not in ("sklearn", "skimage", "all"):
            raise ConfigError(f"data.source must be sklearn, skimage or all, got {source!r}")
        if scale <= 0 or length < 4:
            raise ConfigError(f"data.scale must be positive and data.length at least 4, got {scale} and {length}")
        self.size, self.channels = pair(size, "data.size"), check_channels(channels) or 3
        self.source, self.scale, self.length = source, scale, length

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Masked reconstruction of crops of 8 pixels."""
        given = {"size": 8, "length": 128, "batch_size": 32}
        return {"model": MASKED, "data": {"class_path": "SampleImages", "init_args": given}}

    @functools.cached_property
    def _photos(self) -> tuple[list[str], list[Tensor]]:
        files: list[Path] = []
        if self.source != "skimage":
            files += sorted((package("sklearn") / "datasets" / "images").glob("*.jpg"))
        if self.source != "sklearn":
            folder = package("skimage") / "data"
            files += [folder / name for name in PHOTOS if (folder / name).is_file()]
        photos = [finish(read_image(file, self.channels)) for file in files]
        if self.scale != 1:
            photos = [finish(p, (round(p.shape[1] * self.scale), round(p.shape[2] * self.scale))) for p in photos]
        return [file.name for file in files], photos

    def split(self, name: str) -> Pictures:
        """Crops of one region of every photograph."""
        names, photos = self._photos
        regions = []
        for photo in photos:
            right, middle = photo.shape[2] * 3 // 4, photo.shape[1] // 2
            held = photo[:, :middle, right:] if name == "val" else photo[:, middle:, right:]
            regions.append(photo[:, :, :right] if name == "train" else held)
        length = self.length if name == "train" else self.length // 4
        places = torch.arange(length) % len(regions)
        source = _Regions([f"the {name} region of {n}" for n in names], regions)
        fresh = name == "train"
        return Pictures(source, self.size, self.channels, "random", 1.0, self.seed, fresh, places)

    def sizes(self) -> dict[str, Any]:
        """image_size, channels."""
        return {"image_size": list(self.size or ()), "channels": self.channels}


class _Regions(Source):
    def __init__(self, names: list[str], images: list[Tensor]) -> None:
        super().__init__(names)
        self.images = images

    def read(self, i: int) -> tuple[Tensor, int | None]:
        return self.images[i], None


def package(name: str) -> Path:
    """A package's folder, without importing it."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise ConfigError("data.source needs scikit-image: pip install scikit-image, or set data.source: sklearn")
    return Path(found.origin).parent
