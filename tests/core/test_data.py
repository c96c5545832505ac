from __future__ import annotations

import pytest
import torch
from tests.core.toys import Toy

from quire import ConfigError, DataError, Fields
from quire.data import check_batch, few, mix


def indices(loader):
    return torch.cat([b["index"] for b in loader])


def test_training_order_is_a_function_of_seed_and_epoch():
    loader, again, other = (Toy(seed=s).train_dataloader() for s in (0, 0, 1))
    first = indices(loader)
    assert torch.equal(first, indices(again))
    assert not torch.equal(first, indices(other))
    loader.sampler.set_epoch(1)
    assert not torch.equal(first, indices(loader))
    assert first.sort().values.tolist() == list(range(256))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_continues_where_its_state_says(workers):
    whole = [b["index"] for b in Toy(batch_size=50, num_workers=workers).train_dataloader()]
    loader = Toy(batch_size=50, num_workers=workers).train_dataloader()
    walk = iter(loader)
    for _ in range(2):
        next(walk)
    state = loader.state_dict()
    fresh = Toy(batch_size=50, num_workers=workers).train_dataloader()
    fresh.load_state_dict(state)
    rest = [b["index"] for b in fresh]
    assert [r.tolist() for r in rest] == [w.tolist() for w in whole[2:]]
    assert len([*fresh]) == len(whole)  # the pass after that is a whole one


def test_a_finished_pass_starts_anew_after_reloading():
    loader = Toy(batch_size=50).train_dataloader()
    list(loader)
    fresh = Toy(batch_size=50).train_dataloader()
    fresh.load_state_dict(loader.state_dict())
    assert len(list(fresh)) == 5


def test_evaluation_keeps_order_and_the_last_partial_batch():
    assert indices(Toy(batch_size=20).test_dataloader()).tolist() == list(range(50))


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ConfigError, match="data.batch_size is 300, but Toy has 256 training samples"):
        Toy(batch_size=300).train_dataloader()
    with pytest.raises(ConfigError, match="at least 1"):
        Toy(batch_size=0)


def test_few_labels_are_balanced_seeded_and_nested():
    labels = torch.tensor([0] * 80 + [1] * 15 + [2] * 5)
    data = Fields(vector=torch.arange(100.0)[:, None], label=labels)
    nine, twelve = few(data, 9, seed=0), few(data, 12, seed=0)
    assert nine.tensors["label"].bincount().tolist() == [3, 3, 3]
    assert set(nine.tensors["vector"].flatten().tolist()) < set(twelve.tensors["vector"].flatten().tolist())
    with pytest.raises(ConfigError, match="train_samples is 101, but the training split has 100"):
        few(data, 101, seed=0)


def test_an_empty_split_is_named():
    class Empty(Toy):
        def split(self, name):
            return Fields(vector=torch.zeros(0, 8), label=torch.zeros(0, dtype=torch.long))

    with pytest.raises(DataError, match="Empty: the train split is empty"):
        Empty().train_dataloader()


def test_seeds_of_neighbours_are_unrelated():
    seeds = [mix(0, 0, e, b, 0) for e in range(20) for b in range(50)]
    assert len(set(seeds)) == 1000
    assert min(seeds) >= 0 and max(seeds) < 2**63


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"image": torch.zeros(2, 1, 4, 4, dtype=torch.uint8)}, "image is uint8; convert to float in"),
        ({"image": torch.full((2, 1, 4, 4), 200.0)}, r"image is in 0..255|image is in 200..200"),
        ({"image": torch.full((2, 1, 4, 4), -0.5)}, r"image is in -0.5..-0.5; the field is float in \[0,1\]"),
        ({"image": torch.zeros(2, 4, 4)}, r"shape \[2, 4, 4\]; the field is \[B,C,H,W\]"),
        ({"vector": torch.tensor([[0.0], [float("inf")]])}, "vector of sample 1 is not finite"),
        ({"mask": torch.tensor([[True], [False]])}, "sample 1 has no real tokens"),
    ],
)
def test_a_batch_that_breaks_the_contract_is_named(batch, said):
    with pytest.raises(DataError, match=said):
        check_batch(batch)
