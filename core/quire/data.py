"""The DataModule contract: fields of a batch, splits, seeded order that survives a kill, device-side transforms."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from quire.contracts import Batch, Part, Spec
from quire.errors import ConfigError, DataError

FIELDS: dict[str, str] = {
    "image": "[B,C,H,W] float in [0,1]",
    "depth": "[B,1,H,W] float, any unit; finite, missing pixels are told by depth_valid",
    "depth_valid": "[B,H,W] bool, True = measured",
    "edges": "[B,1,H,W] float in [0,1], gradient magnitude",
    "semantic": "[B,h,w] int64 class of each pixel or block of pixels",
    "audio": "[B,S] float in [-1,1]",
    "frames": "[B,T,F] float, log-mel by default",
    "tokens": "[B,T] int64 ids",
    "mask": "[B,T] bool, True = real",
    "special": "[B,T] or [N] bool, True = a token that marks an end or padding",
    "word_ids": "[B,T] int64 number of the word a token belongs to, -1 for none",
    "doc": "[B,T] int64 number of the document",
    "prompt_length": "[B] int64 real tokens that are given; loss and decoding start behind them",
    "source": "[B,S] int64 ids of an encoder-decoder model's input",
    "source_mask": "[B,S] bool, True = real",
    "source_span": "[B,2] int64 slice of the prompt that an editing drafter may copy",
    "query": "[B,S] int64 ids of what is asked",
    "query_mask": "[B,S] bool, True = real",
    "query_id": "[B] int64 number of the query in its collection",
    "positive": "[B,T] int64 ids of a document that answers the query",
    "positive_mask": "[B,T] bool, True = real",
    "negative": "[B,K,T] int64 ids of documents that do not",
    "negative_mask": "[B,K,T] bool, True = real",
    "teacher_scores": "[B,1+K] float, a teacher's scores of the positive and the negatives",
    "relevant": "[B,R] int64 numbers of the query's relevant documents, -1 for none",
    "gain": "[B,R] float, their grades",
    "vector": "[B,D] float",
    "activation": "[N,D] float, one row a token; [B,T,D] with a mask in analysis",
    "weight": "[N] float, factor of a token's error",
    "token": "[N] int64 id of the token that a row of activations belongs to",
    "position": "[N] int64 place of that token in its row of the source, from 0",
    "instance": "[N] int64 row of the source that it comes from",
    "head": "[N] int64 attention head, at a heads site",
    "grad": "[N,D] float, derivative of the subject's summed loss by the activation",
    "target": "[N,D'] float, another site's activation, for transcoders",
    "states": "[N,S,D] float, activations of one token at S sites",
    "grads": "[N,S,D] float, derivatives at S sites",
    "pattern": "[B,H,T,T] float, attention weights, in analysis",
    "value": "[B,T,H_kv,d_h] float, attention values before they are mixed, in analysis",
    "label": "[B] int64 class",
    "index": "[B] int64 place of the sample in its split",
}
"""Every batch field with shape, dtype and unit. A paper that needs another adds it here."""

SPLITS = ("train", "val", "test")


def mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers; neighbouring inputs give unrelated seeds."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def expand(path: str | Path) -> Path:
    """``path`` with variables and ``~`` expanded; ``$QUIRE_DATA`` unset means the user's cache folder.

    Raises:
        ConfigError: a variable in it is not set.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "quire")
    known = {**os.environ, "QUIRE_DATA": os.environ.get("QUIRE_DATA") or str(cache)}

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in known:
            raise ConfigError(f"the path {path} needs the environment variable {name}, which is not set")
        return known[name]

    return Path(re.sub(r"\$(?:\{(\w+)\}|(\w+))", value, str(path))).expanduser()


class Fields(Dataset):
    """An in-memory split: equally long tensors by field name; a batch is one indexing, no per-sample collation."""

    def __init__(self, **tensors: Tensor) -> None:
        lengths = {k: len(v) for k, v in tensors.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"fields of one split differ in length: {lengths}")
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, i: int) -> Batch:
        return {k: v[i] for k, v in self.tensors.items()}

    def __getitems__(self, indices: list[int]) -> Batch:
        chosen = torch.as_tensor(indices)
        return {k: v[chosen] for k, v in self.tensors.items()}


class Indexed(Dataset):
    """Whole batches of a data set, with ``index``; it knows its epoch, so per-sample randomness is keyed, not streamed.

    Args:
        source: The samples.
        collate: Samples → batch.
    """

    def __init__(self, source: Dataset, collate: Any) -> None:
        self.source, self.collate = source, collate

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __getitems__(self, indices: list[int]) -> Batch:
        fetch = getattr(self.source, "__getitems__", None)
        batch = fetch(indices) if fetch else [self.source[i] for i in indices]
        if not isinstance(batch, dict):
            batch = self.collate(batch)
        batch.setdefault("index", torch.as_tensor(indices))
        return batch

    def __getitem__(self, indices: list[int]) -> Batch:  # for a sampler of whole batches
        return self.__getitems__(indices)


def _same(batch: Batch) -> Batch:
    return batch


class Loader(DataLoader):
    """A DataLoader whose place in the epoch is saved with the checkpoint and restored exactly.

    The order is a function of (seed, epoch), so the place is one number: batches handed out.

    Attributes:
        fitting: The Trainer whose epoch it follows; None where the order has no epoch.
    """

    _seen = 0
    _skip = 0
    fitting: Any = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        skip, self._skip = self._skip, 0
        self._seen = skip
        sampler = self.sampler
        if isinstance(sampler, Order):
            if self.fitting is not None:  # Lightning's own count is one ahead after a stop inside an epoch
                sampler.epoch = self.fitting.current_epoch
            sampler.start = skip * (self.batch_size or 1)
            getattr(self.dataset, "source", self.dataset).epoch = sampler.epoch  # type: ignore[attr-defined, union-attr]
        for batch in super().__iter__():
            self._seen += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Batches handed out in this epoch."""
        return {"seen": self._seen}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Start the next pass after the batches already seen; a finished pass starts anew."""
        self._skip = state["seen"] if state["seen"] < len(self) else 0


class Order(DistributedSampler):
    """DistributedSampler (also for one process) that can start inside an epoch.

    A data module with an order of its own subclasses it; where that yields whole batches, ``start`` counts batches.
    """

    start = 0

    def __iter__(self) -> Iterator[int]:
        start, self.start = self.start, 0
        return iter(list(super().__iter__())[start:])


class Transform(Part):
    """Role of a transform that changes which fields there are, or sizes: ``part(batch, generator) -> batch``.

    One that keeps both needs to be no more than a Part.
    """

    def offers(self, fields: tuple[str, ...]) -> tuple[str, ...]:
        """The fields of a batch after it, given those before."""
        return fields

    def resize(self, spec: Spec) -> Spec:
        """The sizes of the data after it, given those before."""
        return spec


class DataModule(LightningDataModule):
    """Where batches come from. Subclass it and write ``split`` and ``sizes``.

    Args:
        batch_size: Samples per step and process.
        num_workers: Loader processes; 0 loads in the main one.
        seed: Seed of order, few-label subsets and transforms; splits are fixed.
        transforms: Parts run in order on each batch after it is on its device: ``part(batch, generator) -> batch``.
            A part with ``training_only = True`` is left out of validation and test.
        train_samples: Keep only this many training samples (the first of a seeded permutation, balanced over
            classes where there are labels): few-label probes and fine-tuning. None keeps all.

    Raises:
        ConfigError: ``batch_size`` below 1, or above the training set.
    """

    fields: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        transforms: list[Part] | None = None,
        train_samples: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError(f"data.batch_size must be at least 1, got {batch_size}")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.transforms = list(transforms or [])
        self.train_samples = train_samples
        self._splits: dict[str, Dataset] = {}

    # ---- what a subclass writes
    def split(self, name: str) -> Dataset:
        """The data set of ``"train"``, ``"val"`` or ``"test"``: a ``Fields``, or samples as dicts."""
        raise NotImplementedError

    def sizes(self) -> dict[str, Any]:
        """Plain sizes by name: ``image_size``, ``channels``, ``classes``…"""
        raise NotImplementedError

    def collate(self, samples: list[Batch]) -> Batch:
        """Samples → batch; override for ragged fields."""
        return torch.utils.data.default_collate(samples)

    # ---- what everybody else uses
    @property
    def spec(self) -> Spec:
        """Sizes of the data as the model sees them, behind the transforms; linked to ``model.spec``."""
        spec = Spec(self.sizes())
        for part in self.transforms:
            spec = part.resize(spec) if isinstance(part, Transform) else spec
        return spec

    def offered(self) -> tuple[str, ...]:
        """The batch fields that the model sees, behind the transforms; ``fields`` are those before them."""
        fields = tuple(self.fields)
        for part in self.transforms:
            fields = part.offers(fields) if isinstance(part, Transform) else fields
        return fields

    def dataset(self, name: str) -> Dataset:
        """A split, made once. Raises ``DataError`` when it is empty."""
        if name not in self._splits:
            data = self.split(name)
            if len(data) == 0:  # type: ignore[arg-type]
                raise DataError(f"{type(self).__name__}: the {name} split is empty")
            if name == "train" and self.train_samples is not None:
                data = few(data, self.train_samples, self.seed)
            self._splits[name] = data
        return self._splits[name]

    def loader(self, name: str, shuffle: bool = False, batch_size: int | None = None) -> Loader:
        """A loader of one split, seeded and split over ranks."""
        data, size = self.dataset(name), batch_size or self.batch_size
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        total = len(data)  # type: ignore[arg-type]
        if shuffle and size * world > total:
            over = f" on {world} processes" if world > 1 else ""
            raise ConfigError(
                f"data.batch_size is {size}{over}, but {type(self).__name__} has {total} training samples: lower it"
            )
        order = Order(data, world, rank, shuffle=shuffle, seed=self.seed, drop_last=shuffle)
        made = Loader(
            Indexed(data, self.collate),
            batch_size=size,
            sampler=order,
            num_workers=self.num_workers,
            collate_fn=_same,  # type: ignore[arg-type]
            drop_last=shuffle,
            pin_memory=torch.cuda.is_available(),
        )
        made.fitting = self.trainer if shuffle else None
        return made

    def train_dataloader(self) -> Loader:
        """Shuffled; the last partial batch is dropped."""
        return self.loader("train", shuffle=True)

    def val_dataloader(self) -> Loader:
        """In order."""
        return self.loader("val")

    def test_dataloader(self) -> Loader:
        """In order."""
        return self.loader("test")

    def predict_dataloader(self) -> Loader:
        """The test split, in order."""
        return self.loader("test")

    def transform(self, batch: Batch, generator: torch.Generator, training: bool) -> Batch:
        """Run the transforms on a batch that is on its device."""
        for part in self.transforms:
            if training or not getattr(part, "training_only", False):
                batch = part(batch, generator)
        return batch


def few(data: Dataset, count: int, seed: int) -> Dataset:
    """``count`` samples of a seeded permutation, as even over classes as the labels allow."""
    total = len(data)  # type: ignore[arg-type]
    if not 0 < count <= total:
        raise ConfigError(f"data.train_samples is {count}, but the training split has {total} samples: lower it")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    labels = data.tensors.get("label") if isinstance(data, Fields) else getattr(data, "labels", None)
    if labels is not None:
        labels = torch.as_tensor(labels)[order]
        rank = torch.empty(total, dtype=torch.long)
        for value in labels.unique():  # rank within its class, so low ranks are balanced
            own = labels == value
            rank[own] = torch.arange(int(own.sum()))
        order = order[torch.argsort(rank, stable=True)]
    chosen = order[:count].sort().values
    if isinstance(data, Fields):
        return Fields(**data.__getitems__(chosen.tolist()))
    return data.take(chosen) if hasattr(data, "take") else Subset(data, chosen.tolist())


def check_batch(batch: Batch) -> None:
    """Refuse a batch whose fields break ``FIELDS``: names the field, the sample and the range found."""
    for name, value in batch.items():
        if not isinstance(value, Tensor) or not value.numel():
            continue
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value.flatten(1) if value.ndim > 1 else value[:, None])).any(1).nonzero()[0])
            where = f" (index {int(batch['index'][bad])})" if isinstance(batch.get("index"), Tensor) else ""
            raise DataError(f"{name} of sample {bad}{where} is not finite: it holds NaN or infinity")
        if name == "image":
            if not value.is_floating_point():
                raise DataError(f"image is {str(value.dtype).removeprefix('torch.')}; convert to float in [0,1]")
            if value.ndim != 4:
                raise DataError(f"image has shape {list(value.shape)}; the field is [B,C,H,W]")
            low, high = float(value.min()), float(value.max())
            if low < 0 or high > 1:
                said = "image is in 0..255" if high > 2 and low >= 0 else f"image is in {low:g}..{high:g}"
                first = int(((value < 0) | (value > 1)).flatten(1).any(1).nonzero()[0])
                raise DataError(f"{said}; the field is float in [0,1] (first such sample: {first})")
        if name == "mask" and value.ndim == 2 and not bool(value.any(1).all()):
            what = "frames" if "frames" in batch else "tokens"
            raise DataError(f"sample {int((~value.any(1)).nonzero()[0])} has no real {what}")
