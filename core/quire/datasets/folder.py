"""Image files in folders, read sample by sample."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import Dataset

from quire.contracts import Batch
from quire.data import expand
from quire.datasets.images import Size, plain_sizes
from quire.datasets.pixels import Files, Pictures, check_channels, pair, read_image
from quire.datasets.samples import MASKED, package
from quire.datasets.splits import TrainTest, random_split, stratified_split
from quire.errors import ConfigError, DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


class ImageFolder(TrainTest):
    """Image files: one folder a class, or one flat folder without labels.

    Folders ``train`` and ``test`` (or ``val``) under the root are the split; without them ``test_fraction`` of the
    files, in proportion to the classes and drawn by a generator seeded 0, is held out. Files are read sample by
    sample.

    Fields: image [B,C,H,W] float in [0,1], label [B] when there are class folders.

    Args:
        root: The folder, or several that are joined; ``$QUIRE_DATA`` and ``~`` are expanded.
        size: Height and width in pixels; null takes images as they are, which must then be equally large.
        channels: 1 (grey) or 3 (RGB).
        fit: ``"crop"`` scales until ``size`` is covered and takes the middle; ``"stretch"`` ignores the aspect;
            ``"random"`` cuts ``size`` at random, anew in each training epoch and fixed in the others.
        scale: Factor on both sides before anything is cut.
        crops: Training samples from each image and epoch.
        corrupt: ``"error"`` stops at a file that can't be read; ``"skip"`` reads every file once at the start,
            leaves those out, and names and counts them in a warning.
        test_fraction: Share of the files held out, in (0, 1), where the folders make no split.
        **kwargs: Arguments of ``TrainTest`` (``val_samples``) and ``DataModule``.

    Raises:
        ConfigError: no such folder, no image in it, or images both beside and inside class folders.
        DataError: a file that can't be read (named), or one of another size while ``size`` is null.
    """

    fields: ClassVar[tuple[str, ...]] = ("image", "label", "index")

    def __init__(
        self,
        root: str | list[str],
        size: Size = None,
        channels: int = 3,
        fit: Literal["crop", "stretch", "random"] = "crop",
        scale: float = 1.0,
        crops: int = 1,
        corrupt: Literal["error", "skip"] = "error",
        test_fraction: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if fit not in ("crop", "stretch", "random") or corrupt not in ("error", "skip"):
            raise ConfigError(
                f"data.fit is crop, stretch or random and data.corrupt error or skip, got {fit}, {corrupt}"
            )
        if not 0 < test_fraction < 1:
            raise ConfigError(f"data.test_fraction must be in (0, 1), got {test_fraction}")
        if scale <= 0 or crops < 1:
            raise ConfigError(f"data.scale must be positive and data.crops at least 1, got {scale} and {crops}")
        self.roots = [expand(r) for r in ([root] if isinstance(root, str) else root)]
        self.size, self.channels = pair(size, "data.size"), check_channels(channels) or 3
        self.fit, self.scale, self.crops, self.corrupt, self.test_fraction = fit, scale, crops, corrupt, test_fraction
        self._files: dict[str, list[tuple[Path, str]]] = {}
        if not self.classes:
            self.fields = ("image", "index")  # type: ignore[misc]

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Crops of scikit-learn's two photographs, in a flat folder."""
        folder = str(package("sklearn") / "datasets" / "images")
        given = {"root": folder, "size": 8, "fit": "random", "crops": 32, "test_fraction": 0.5, "batch_size": 16}
        return {"model": MASKED, "data": {"class_path": "ImageFolder", "init_args": given}}

    @functools.cached_property
    def classes(self) -> list[str] | None:
        """Class folder names in order; None for a flat folder."""
        names = sorted({name for _, name in self._listed("train")} - {""})
        return names or None

    def _listed(self, part: str) -> list[tuple[Path, str]]:
        """(file, class name or "") of a part's folder; of everything where the folders make no split."""
        if part in self._files:
            return self._files[part]
        found: list[tuple[Path, str]] = []
        for root in self.roots:
            folders = [root / n for n in (("train",) if part == "train" else ("test", "val")) if (root / n).is_dir()]
            found += _images_in(folders[0] if folders else root)
        if any(name for _, name in found) and not all(name for _, name in found):
            stray = next(file for file, name in found if not name)
            raise ConfigError(f"{stray} lies beside class folders: move it into one, or keep one flat folder")
        self._files[part] = found
        return found

    def load(self, part: str) -> Pictures:
        """One part; ``crops`` is applied by ``split``."""
        listed = self._listed(part)
        classes = self.classes
        unknown = sorted({name for _, name in listed} - set(classes or [""]))
        if unknown:
            raise DataError(f"the {part} folder has the class {unknown[0]!r}, which the training folder lacks")
        labels = torch.tensor([classes.index(name) for _, name in listed]) if classes else None
        source = Files([file for file, _ in listed], labels, self.channels)
        whole = Pictures(source, self.size, self.channels, self.fit, self.scale, self.seed, part == "train")
        if not any((root / "train").is_dir() for root in self.roots):
            held = min(max(1, round(len(listed) * self.test_fraction)), len(listed) - 1)
            how = random_split(len(listed), held) if labels is None else stratified_split(labels, held)
            whole = whole.take(how[part == "test"])
        if self.corrupt == "skip":
            whole = _readable(whole, source, part)
        return whole

    def split(self, name: str) -> Dataset:
        """As ``TrainTest``; training images are repeated ``crops`` times."""
        data: Any = super().split(name)
        return data.take(torch.arange(len(data)).repeat(self.crops)) if name == "train" and self.crops > 1 else data

    def collate(self, samples: list[Batch]) -> Batch:
        """Stacked. Raises ``DataError`` when images differ in size."""
        sizes = sorted({tuple(s["image"].shape[-2:]) for s in samples})
        if len(sizes) > 1:
            some = " and ".join(f"{h}x{w}" for h, w in sizes[:2])
            raise DataError(f"images under {self.roots[0]} differ in size, {some}: set data.size")
        return super().collate(samples)

    def sizes(self) -> dict[str, Any]:
        """image_size, channels, and classes where there are class folders."""
        sample = self.dataset("train")[0]["image"]
        return plain_sizes(sample, len(self.classes) if self.classes else None)


def _images_in(folder: Path) -> list[tuple[Path, str]]:
    if not folder.is_dir():
        raise ConfigError(f"data.root: there is no folder {folder}")
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    if not files:
        raise ConfigError(f"data.root: {folder} holds no image ({', '.join(SUFFIXES[:4])}…)")
    return [(f, f.relative_to(folder).parts[0] if f.parent != folder else "") for f in files]


def _readable(data: Pictures, source: Files, part: str) -> Pictures:
    good, bad = [], []
    for i, place in enumerate(data.places.tolist()):
        try:
            read_image(source.files[place], source.channels)
            good.append(i)
        except DataError:
            bad.append(str(source.files[place]))
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        rank_zero_warn(
            f"{len(bad)} of {len(data)} {part} images can't be read and are left out: {', '.join(bad[:5])}{more}"
        )
    return data.take(torch.tensor(good, dtype=torch.long))
