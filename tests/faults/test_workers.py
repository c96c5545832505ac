"""Loader processes are a matter of speed only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.core.toys import Toy

from quire import DataModule
from quire.datasets.images import Digits
from quire.datasets.samples import SampleImages

SOURCES: dict[str, Any] = {
    "in memory": lambda workers: Toy(batch_size=50, num_workers=workers),
    "images in memory": lambda workers: Digits(batch_size=300, num_workers=workers),
    "crops at random": lambda workers: SampleImages(size=8, length=40, batch_size=8, num_workers=workers),
    "few crops at random": lambda workers: SampleImages(
        size=8, length=40, batch_size=8, train_samples=20, num_workers=workers
    ),
}


def epochs(data: DataModule, count: int = 2) -> list[list[dict[str, Any]]]:
    loader, seen = data.train_dataloader(), []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        seen.append(list(loader))
    return seen


@pytest.mark.parametrize("name", SOURCES)
def test_two_loader_processes_give_the_batches_of_none(name: str) -> None:
    for own, theirs in zip(epochs(SOURCES[name](0)), epochs(SOURCES[name](2)), strict=True):
        for a, b in zip(own, theirs, strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", ["crops at random", "few crops at random"])
def test_random_crops_change_from_epoch_to_epoch(name: str) -> None:
    first, second = (torch.cat([b["image"] for b in e]) for e in epochs(SOURCES[name](0)))
    order = [torch.cat([b["index"] for b in e]).argsort() for e in epochs(SOURCES[name](0))]
    assert not torch.equal(first[order[0]], second[order[1]])
