"""Embedded digits, and torchvision's image sets. Images are float in [0,1]; normalisation belongs to the encoder."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from quire.data import Fields, expand
from quire.datasets.idx import find_idx, read_pair
from quire.datasets.pixels import Pictures, Pixels, Source, channels_first, check_channels, finish, pair
from quire.datasets.splits import TrainTest, random_split, stratified_split
from quire.errors import ConfigError, DataError, suggest

Size = int | list[int] | None
IDX = ("MNIST", "FashionMNIST", "KMNIST")
RAW = {"encoder": "FlatPixels", "objective": "Classify"}


def plain_sizes(sample: Tensor, classes: int | None) -> dict[str, Any]:
    """``image_size``, ``channels`` and, if known, ``classes`` of samples like this one."""
    channels, height, width = sample.shape[-3:]
    sizes: dict[str, Any] = {"image_size": [height, width], "channels": channels}
    return sizes if classes is None else {**sizes, "classes": classes}


class Digits(TrainTest):
    """scikit-learn's handwritten digits, in every install: 1797 grey images of 8x8, ten classes.

    Fields: image [B,1,8,8] float in [0,1] (the set's 0..16 divided by 16), label [B].

    Args:
        split: ``"random"``: 1400 training and 397 test samples, the first and last of a permutation seeded 0;
            ``"stratified"``: 1347 and 450, every class in proportion.
        size: Height and width in pixels to resize to (bilinear); null keeps 8.
        channels: 3 repeats the grey channel; null keeps 1.
        **kwargs: Arguments of ``TrainTest`` (``val_samples``) and ``DataModule``.

    Raises:
        ConfigError: an unknown split, or a size or number of channels that isn't possible.
    """

    fields = ("image", "label", "index")

    def __init__(
        self,
        split: Literal["random", "stratified"] = "random",
        size: Size = None,
        channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if split not in ("random", "stratified"):
            raise ConfigError(f"data.split must be random or stratified, got {split!r}")
        self.how, self.size, self.channels = split, pair(size, "data.size"), check_channels(channels)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Classify raw pixels."""
        return {"model": RAW, "data": {"class_path": "Digits", "init_args": {"train_samples": 256}}}

    def load(self, part: str) -> Fields:
        """One part, in memory."""
        from sklearn.datasets import load_digits

        found = load_digits()
        images = torch.from_numpy(found.images).float()[:, None] / 16
        labels = torch.from_numpy(found.target).long()
        chosen = random_split(1797, 397) if self.how == "random" else stratified_split(labels, 450)
        rows = chosen[part == "test"]
        return Fields(image=finish(images[rows], self.size, self.channels), label=labels[rows])

    def sizes(self) -> dict[str, Any]:
        """image_size, channels, classes."""
        return {"image_size": list(self.size or (8, 8)), "channels": self.channels or 1, "classes": 10}


class TorchvisionImages(TrainTest):
    """Any image classification set of torchvision by its class name: MNIST, FashionMNIST, CIFAR10, SVHN and more.

    MNIST's IDX files (raw or .gz) are read without torchvision from the root, ``raw/`` or ``NAME/raw/``. Sets that
    torchvision holds in memory stay there as bytes; others are decoded sample by sample. A set without a split
    of its own gives a tenth, drawn by a generator seeded 0, as its test part.

    Fields: image [B,C,H,W] float in [0,1], label [B].

    Args:
        name: Class in ``torchvision.datasets``.
        root: Folder with the files; ``$QUIRE_DATA`` and ``~`` are expanded.
        download: Fetch what is missing; a complete root is read without a network either way.
        size: Height and width in pixels: whole sets are resized (bilinear), single files scaled and cut to the middle.
        channels: 1 (grey) or 3 (RGB); null keeps what the set has.
        options: Further arguments of the torchvision class, such as ``{split: letters}`` for EMNIST.
        **kwargs: Arguments of ``TrainTest`` (``val_samples``) and ``DataModule``.

    Raises:
        ConfigError: an unknown set, or nothing under ``root`` while ``download`` is off.
        DataError: a broken or truncated file (named), or a failed download.
    """

    fields = ("image", "label", "index")

    def __init__(
        self,
        name: str = "MNIST",
        root: str = "$QUIRE_DATA",
        download: bool = True,
        size: Size = None,
        channels: int | None = None,
        options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.which, self.root, self.download, self.options = name, expand(root), download, dict(options or {})
        self.size, self.channels = pair(size, "data.size"), check_channels(channels)
        self._classes: int | None = None

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """torchvision's generated noise images, so that no file is needed."""
        options = {"size": 64, "image_size": [3, 8, 8], "num_classes": 2}
        data = {"name": "FakeData", "download": False, "options": options, "batch_size": 16}
        return {"model": RAW, "data": {"class_path": "TorchvisionImages", "init_args": data}}

    def load(self, part: str) -> Dataset:
        """One part, in memory where torchvision has it there."""
        files = find_idx(self.root, self.which, part) if self.which in IDX else None
        if files:
            images, labels = read_pair(*files)
            return Pixels(self.size, self.channels, image=images, label=labels)
        made, whole = _torchvision(self.which, self.root, part, self.download, self.options)
        held = getattr(made, "data", None)
        targets = getattr(made, "targets", getattr(made, "labels", None))
        data: Pixels | Pictures
        if isinstance(held, (np.ndarray, Tensor)) and targets is not None and np.ndim(held) in (3, 4):
            labels = torch.as_tensor(np.asarray(targets)).long()
            data = Pixels(self.size, self.channels, image=channels_first(held), label=labels)
        else:
            data = Pictures(_Torchvision(made, self.which), self.size, self.channels or 3)
        if not whole:
            return data
        rest, tenth = random_split(len(data), len(data) // 10)
        return data.take(tenth if part == "test" else rest)

    def sizes(self) -> dict[str, Any]:
        """image_size, channels, classes."""
        train: Any = self.part("train")
        if self._classes is None:
            named = getattr(getattr(getattr(train, "source", None), "made", None), "classes", None)
            labels = train.tensors["label"] if isinstance(train, Fields) else None
            count = self.options.get("num_classes") if labels is None else int(labels.max()) + 1
            self._classes = len(named) if named else count
        return plain_sizes(train[0]["image"], self._classes)


class _Torchvision(Source):
    """A torchvision set whose images are decoded one by one."""

    def __init__(self, made: Any, name: str) -> None:
        targets = getattr(made, "targets", getattr(made, "_labels", None))
        super().__init__(range(len(made)), None if targets is None else torch.as_tensor(np.asarray(targets)).long())
        self.made, self.which = made, name

    def read(self, i: int) -> tuple[Tensor, int | None]:
        """One sample, decoded."""
        try:
            image, label = self.made[i]
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"sample {i} of {self.which} can't be read ({error}): fetch the set again") from error
        pixels = np.array(image.convert("RGB"))
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), int(label)


def _torchvision(name: str, root: Path, part: str, download: bool, options: dict[str, Any]) -> tuple[Any, bool]:
    """(the torchvision data set, whether it has no split of its own)."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ConfigError("TorchvisionImages needs torchvision: pip install 'quire[vision]'") from error
    cls = getattr(datasets, name, None) if name in datasets.__all__ else None
    if cls is None:
        raise ConfigError(f"data.name: torchvision has no set {name}{suggest(name, list(datasets.__all__))}")
    takes = inspect.signature(cls).parameters
    given: dict[str, Any] = {
        "root": str(root),
        "download": download,
        "train": part == "train",
        "split": part,
        **options,
    }
    unknown = sorted(set(options) - set(takes))
    if unknown:
        raise ConfigError(f"data.options: torchvision's {name} takes no {', '.join(unknown)}")
    given = {k: v for k, v in given.items() if k in takes}
    whole = not {"train", "split"} & set(takes)
    try:
        try:
            return cls(**given), whole
        except ValueError as error:  # some sets say val, not test
            if given.get("split") != "test" or "Unknown value" not in str(error):
                raise
            return cls(**{**given, "split": "val"}), whole
    except Exception as error:  # every set fails in its own way
        said = " ".join(str(error).split()) or type(error).__name__
        if not download and isinstance(error, (RuntimeError, FileNotFoundError)):
            raise ConfigError(
                f"no complete {name} under {root} ({said}): set data.root, or data.download: true"
            ) from error
        raise DataError(
            f"{name} under {root} can't be read or fetched ({said}): put a complete copy there, or change data.root"
        ) from error
