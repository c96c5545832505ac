"""Random aligned crops of one photograph and its measured disparity; data for MultiMAE (Bachmann et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from quire.contracts import Batch
from quire.data import DataModule, expand, mix
from quire.datasets.pixels import pair
from quire.errors import ConfigError
from quire_multimae.adapters import tiny_run
from quire_multimae.files import read


class StereoCrops(DataModule):
    """Aligned crops of one image and its disparity: real depth with missing values. For Bachmann et al. 2022.

    Training crops come from the left three quarters, validation from the upper and test from the lower half of the
    rest. Disparity that isn't finite is 0 and marked in ``depth_valid``: no target.

    Fields: image [B,3,H,W] in [0,1], depth [B,1,H,W] (the disparity, in pixels), depth_valid [B,H,W] bool.

    Args:
        image: Image file; ``$QUIRE_DATA`` and ``~`` are expanded.
        disparity: npz, npy, PNG or TIFF file of the same size.
        size: Height and width of a crop in pixels.
        length: Training crops an epoch; validation and test have a quarter as many, the same in every epoch.
        **kwargs: Arguments of ``DataModule``.

    Raises:
        ConfigError: a file that is missing, sizes that differ, or crops larger than a region.
    """

    fields = ("image", "depth", "depth_valid", "index")

    def __init__(
        self,
        image: str = "$QUIRE_DATA/stereo_motorcycle/motorcycle_left.png",
        disparity: str = "$QUIRE_DATA/stereo_motorcycle/motorcycle_disp.npz",
        size: int | list[int] = 32,
        length: int = 1024,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if length < 4:
            raise ConfigError(f"data.length must be at least 4, got {length}")
        self.image, self.disparity = expand(image), expand(disparity)
        self.size, self.length = pair(size, "data.size") or (32, 32), length

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """MultiMAE on crops of 16 pixels."""
        patch = {"patch": 8}
        run = tiny_run({"image": ("PatchAdapter", patch), "depth": ("PatchAdapter", patch)})
        folder = "$QUIRE_DATA/stereo_motorcycle"
        given = {"image": f"{folder}/motorcycle_left.png", "disparity": f"{folder}/motorcycle_disp.npz"}
        more = {"size": 16, "length": 128, "transforms": [{"class_path": "TruncatedStandardize"}]}
        return {**run, "data": {"class_path": "StereoCrops", "init_args": {**given, **more}}}

    def split(self, name: str) -> Dataset:
        """Crops of one region."""
        for file in (self.image, self.disparity):
            if not file.is_file():
                raise ConfigError(f"there is no file {file}: set data.image and data.disparity")
        image, depth = read(self.image, "rgb"), read(self.disparity, "depth")
        if image.shape[1:] != depth.shape[1:]:
            raise ConfigError(f"{self.disparity} is {list(depth.shape[1:])}, {self.image} is {list(image.shape[1:])}")
        right, middle = image.shape[2] * 3 // 4, image.shape[1] // 2
        rows, columns = slice(None), slice(right)
        if name != "train":
            rows, columns = (slice(middle) if name == "val" else slice(middle, None)), slice(right, None)
        image, depth = image[:, rows, columns], depth[:, rows, columns]
        if image.shape[1] < self.size[0] or image.shape[2] < self.size[1]:
            raise ConfigError(
                f"the {name} region has {image.shape[1]}x{image.shape[2]} pixels, too few for "
                f"{self.size[0]}x{self.size[1]}: lower data.size"
            )
        length = self.length if name == "train" else self.length // 4
        return Crops(image, depth, self.size, torch.arange(length), self.seed, name == "train")

    def sizes(self) -> dict[str, Any]:
        """image_size, channels, and what each modality is."""
        size = list(self.size)
        modalities = {"image": {"channels": 3, "size": size}, "depth": {"channels": 1, "size": size}}
        return {"image_size": size, "channels": 3, "modalities": modalities}


class Crops(Dataset):
    """Crops that depend on (seed, epoch, place) alone.

    Args:
        image: [3,H,W]. depth: [1,H,W].
        size: Of a crop.
        places: The samples.
        seed, fresh: Key of the draws; whether they change from epoch to epoch.
    """

    epoch = 0

    def __init__(
        self, image: Tensor, depth: Tensor, size: tuple[int, int], places: Tensor, seed: int, fresh: bool
    ) -> None:
        self.image, self.depth, self.size, self.places, self.seed, self.fresh = image, depth, size, places, seed, fresh

    def __len__(self) -> int:
        return len(self.places)

    def take(self, indices: Tensor) -> Crops:
        """Some of the samples."""
        return Crops(self.image, self.depth, self.size, self.places[indices], self.seed, self.fresh)

    def __getitem__(self, i: int) -> Batch:
        key = mix(self.seed, self.epoch if self.fresh else 0, int(self.places[i]))
        generator = torch.Generator().manual_seed(key)
        (h, w), (height, width) = self.size, self.image.shape[1:]
        top = int(torch.randint(height - h + 1, (), generator=generator))
        left = int(torch.randint(width - w + 1, (), generator=generator))
        box = (slice(None), slice(top, top + h), slice(left, left + w))
        depth = self.depth[box]
        valid = torch.isfinite(depth[0])
        return {"image": self.image[box].clone(), "depth": torch.where(valid, depth, 0.0), "depth_valid": valid}
