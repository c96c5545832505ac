"""Classes one group after the other, without telling when: the protocol of Träuble et al. 2023."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.data import Dataset

from quire.contracts import Batch
from quire.data import DataModule, Fields, Indexed, Loader, Order, mix
from quire.datasets.splits import label_of
from quire.errors import ConfigError, DataError

log = logging.getLogger(__name__)


class ClassIncremental(DataModule):
    """Another data module's training samples, split by split of its classes. Träuble et al. 2023.

    One ``fit`` of ``splits`` times ``epochs_per_split`` epochs; an epoch is one pass over its split. Batches don't say
    which split they are from. Validation and test hold all classes. Every epoch has as many batches, of nearly equal
    size and at most ``batch_size``: no sample is dropped.

    Args:
        base: Where samples come from; its ``batch_size``, transforms and the like hold.
        splits: Groups of classes, all of one size.
        epochs_per_split: Epochs until the next group.
        order_seed: Seed of the order of classes; null keeps 0, 1, 2….
        iid: The control: the same number of steps and passes, but all classes are mixed throughout.

    Returns:
        The fields of ``base``. The spec has ``tasks``, the classes of each split, beside its sizes.

    Raises:
        ConfigError: no labels, splits that don't divide the classes, or counts below 1.
        DataError: a label outside the classes, one that training never shows, or a split without samples.
    """

    fields = ("label",)

    def __init__(
        self,
        base: DataModule,
        splits: int = 5,
        epochs_per_split: int = 20,
        order_seed: int | None = None,
        iid: bool = False,
    ) -> None:
        super().__init__(base.batch_size, base.num_workers, base.seed)
        if splits < 1 or epochs_per_split < 1:
            raise ConfigError(
                f"ClassIncremental needs splits and epochs_per_split of at least 1, got {splits} and {epochs_per_split}"
            )
        self.base, self.splits, self.epochs_per_split = base, splits, epochs_per_split
        self.order_seed, self.iid = order_seed, iid
        self.transforms = base.transforms
        self._offer()

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Raw pixels of digits, two classes after the other."""
        base = {"class_path": "Digits", "init_args": {"train_samples": 256}}
        data = {"class_path": "ClassIncremental", "init_args": {"base": base, "epochs_per_split": 1}}
        return {"model": {"encoder": "FlatPixels", "objective": "Classify"}, "data": data, "trainer": {"max_epochs": 5}}

    # ---- what the base has
    @property
    def subject(self) -> Any:
        """The base's frozen subject, where it has one."""
        return getattr(self.base, "subject", None)

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer, where it has one."""
        return getattr(self.base, "tokenizer", None)

    def _offer(self) -> None:
        self.fields = tuple(self.base.fields)  # type: ignore[misc, assignment]

    def prepare_data(self) -> None:
        """As the base."""
        self.base.prepare_data()

    def setup(self, stage: str) -> None:
        """As the base; then its fields are known."""
        self.base.setup(stage)
        self._offer()
        if "label" not in self.offered():
            name, have = type(self.base).__name__, ", ".join(self.fields) or "none"
            raise ConfigError(
                f"ClassIncremental splits by label; data.base {name} offers {have}: name data with labels"
            )

    def collate(self, samples: list[Batch]) -> Batch:
        """As the base."""
        return self.base.collate(samples)

    def sizes(self) -> dict[str, Any]:
        """The base's, and ``tasks``: the classes of each split in turn."""
        tasks = self.tasks()
        return {"classes": sum(map(len, tasks)), **self.base.sizes(), "tasks": tasks}

    def tasks(self) -> list[list[int]]:
        """Classes of each split.

        Raises:
            ConfigError: splits that don't divide the classes.
        """
        classes = self.base.sizes().get("classes")
        if classes is None:
            classes = int(labels_of(whole(self.base, "train")).max()) + 1
        if classes % self.splits:
            raise ConfigError(f"data.splits is {self.splits}, which does not divide the {classes} classes")
        order = torch.arange(classes)
        if self.order_seed is not None:
            order = torch.randperm(classes, generator=torch.Generator().manual_seed(self.order_seed))
        return order.view(self.splits, -1).tolist()

    def split(self, name: str) -> Dataset:
        """The base's split, its labels compared with what training shows."""
        data, tasks = whole(self.base, name), self.tasks()
        labels, classes = labels_of(data), sum(map(len, tasks))
        wrong = (labels < 0) | (labels >= classes)
        if bool(wrong.any()):
            place = int(wrong.nonzero()[0])
            raise DataError(
                f"label {int(labels[place])} of {name} sample {place} is in no split: the stream has {classes} classes"
            )
        if name == "train":
            empty = [i for i, task in enumerate(tasks) if not torch.isin(labels, torch.tensor(task)).any()]
            if empty:
                raise DataError(f"split {empty[0]} (classes {tasks[empty[0]]}) has no training sample")
            return data
        unseen = labels[~torch.isin(labels, labels_of(self.dataset("train")).unique())]
        if len(unseen):
            raise DataError(f"label {int(unseen[0])} of the {name} split never occurs in training: no split teaches it")
        return data

    # ---- the stream
    def current(self, epoch: int) -> int:
        """The split that an epoch is in."""
        return min(epoch // self.epochs_per_split, self.splits - 1)

    def train_dataloader(self) -> Loader:
        """Batches of one split at a time."""
        data = self.dataset("train")
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        epochs, most = self.splits * self.epochs_per_split, getattr(self.trainer, "max_epochs", None)
        if most is not None and most not in (-1, epochs):
            warnings.warn(
                f"the stream has {self.splits} x {self.epochs_per_split} = {epochs} epochs, trainer.max_epochs is "
                f"{most}: set it to {epochs}",
                stacklevel=2,
            )
        labels = labels_of(data)
        parts = [torch.isin(labels, torch.tensor(task)).nonzero()[:, 0] for task in self.tasks()]
        stream = Stream(data, parts, self.batch_size, self.epochs_per_split, self.iid, world, rank, self.seed)
        return Loader(
            Indexed(data, self.collate),
            batch_size=None,
            sampler=stream,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )


class Stream(Order):
    """Whole batches of an epoch's split; the order is a function of (seed, epoch).

    Args:
        data: The samples.
        parts: Places of each split's samples.
        size: Most samples a batch and process.
        epochs: Epochs of a split.
        iid: Whether all parts are mixed; ``len(parts)`` epochs are then one pass over everything.
        world: Processes. rank: This one. seed: Of the order.
    """

    def __init__(
        self, data: Any, parts: list[Tensor], size: int, epochs: int, iid: bool, world: int, rank: int, seed: int
    ) -> None:
        super().__init__(data, world, rank, shuffle=True, seed=seed)
        self.parts, self.epochs, self.iid = parts, epochs, iid
        self.batches = -(-max(map(len, parts)) // (size * world))

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        places = self._places()
        least = self.batches * self.num_replicas
        if len(places) < least:  # a small split: every batch of every process has a sample
            places = places[torch.arange(least) % len(places)]
        batches = places.tensor_split(self.batches)
        return iter([batch[self.rank :: self.num_replicas].tolist() for batch in batches[start:]])

    def _places(self) -> Tensor:
        count = len(self.parts)
        if self.iid:
            turn, part = divmod(self.epoch, count)
            every = torch.cat(self.parts)
            return every[self._order(len(every), turn)].tensor_split(count)[part]
        own = self.parts[min(self.epoch // self.epochs, count - 1)]
        return own[self._order(len(own), self.epoch)]

    def _order(self, length: int, turn: int) -> Tensor:
        return torch.randperm(length, generator=torch.Generator().manual_seed(mix(self.seed, turn)))


def labels_of(data: Dataset) -> Tensor:
    """All labels [N] of a data set; reads the samples where it can't be helped."""
    known = label_of(data)
    if known is None:
        inner = getattr(data, "dataset", None)  # a Subset's
        above = None if inner is None else label_of(inner)
        known = above[torch.as_tensor(data.indices)] if above is not None else None  # type: ignore[attr-defined]
    if known is None:
        known = torch.tensor([int(data[i]["label"]) for i in range(len(data))])  # type: ignore[arg-type]
    return torch.as_tensor(known).long()


_read: WeakKeyDictionary[DataModule, dict[str, Fields]] = WeakKeyDictionary()


def whole(source: DataModule, name: str) -> Dataset:
    """A split that can be indexed: the data module's own, or its batches read once into memory.

    Activations of a frozen subject have no samples to index; in analysis mode each is one of the source's.
    """
    try:
        return source.dataset(name)
    except NotImplementedError:
        pass
    kept = _read.setdefault(source, {})
    if name not in kept:
        source.setup("fit")
        batches = list(getattr(source, f"{name}_dataloader")())
        tensors = [k for k, v in batches[0].items() if isinstance(v, Tensor) and v.ndim]
        fields = {k: torch.cat([b[k].cpu() for b in batches]) for k in tensors}
        if "index" in fields:
            order = torch.argsort(fields.pop("index"))
            fields = {k: v[order] for k, v in fields.items()}
        log.info("%s, %s: read once into memory", type(source).__name__, name)
        kept[name] = Fields(**fields)
    return kept[name]
