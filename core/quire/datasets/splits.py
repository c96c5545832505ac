"""Fixed splits: the test part never moves with ``data.seed``, and validation is held out of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from quire.data import DataModule, Fields
from quire.errors import ConfigError


def random_split(total: int, held: int) -> tuple[Tensor, Tensor]:
    """(rest, held) of a permutation by a generator seeded 0; the held samples are its last."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    return order[: total - held], order[total - held :]


def stratified_split(labels: Tensor, held: int) -> tuple[Tensor, Tensor]:
    """(rest, held) with every class held out in proportion, by a generator seeded 0; ``held`` is exact."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    shuffled = labels[order]
    place = torch.empty(len(labels), dtype=torch.double)
    for value in shuffled.unique():  # place in its class, in (0, 1): the lowest over all classes are held out
        own = shuffled == value
        count = int(own.sum())
        place[own] = (torch.arange(count, dtype=torch.double) + 0.5) / count
    order = order[torch.argsort(place, stable=True)]
    return order[held:].sort().values, order[:held].sort().values


def take(data: Dataset, indices: Tensor) -> Dataset:
    """Some samples of ``data``, in the order of ``indices``."""
    if hasattr(data, "take"):
        return data.take(indices)
    if type(data) is Fields:
        return Fields(**{name: value[indices] for name, value in data.tensors.items()})
    return Subset(data, indices.tolist())


class TrainTest(DataModule):
    """Data with a training and a test part. Subclass it and write ``load`` and ``sizes``.

    Args:
        val_samples: Training samples set apart as the val split, in proportion to the classes. 0 makes the test
            split serve as val too; then choose no setting by what validation says.
        **kwargs: Arguments of ``DataModule``.

    Raises:
        ConfigError: ``val_samples`` negative or not below the training samples.
    """

    def __init__(self, val_samples: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if val_samples < 0:
            raise ConfigError(f"data.val_samples must be at least 0, got {val_samples}")
        self.val_samples = val_samples
        self._parts: dict[str, Dataset] = {}

    def load(self, part: str) -> Dataset:
        """The data set of ``"train"`` or ``"test"``, labels in ``tensors["label"]`` or ``labels`` if it has any."""
        raise NotImplementedError

    def part(self, name: str) -> Dataset:
        """``load(name)``, once."""
        if name not in self._parts:
            self._parts[name] = self.load(name)
        return self._parts[name]

    def split(self, name: str) -> Dataset:
        """The test part, or the training part without or with only the held-out samples."""
        if name == "test" or (name == "val" and not self.val_samples):
            return self.part("test")
        whole = self.part("train")
        if not self.val_samples:
            return whole
        total, labels = len(whole), label_of(whole)  # type: ignore[arg-type]
        if self.val_samples >= total:
            raise ConfigError(f"data.val_samples is {self.val_samples}, but there are {total} training samples")
        rest, held = (
            stratified_split(labels, self.val_samples) if labels is not None else random_split(total, self.val_samples)
        )
        return take(whole, rest if name == "train" else held)


def label_of(data: Dataset) -> Tensor | None:
    """All labels of a data set that knows them without reading its samples; else None."""
    return data.tensors.get("label") if isinstance(data, Fields) else getattr(data, "labels", None)
