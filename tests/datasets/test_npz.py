"""NpzImages: bytes, floats, packed bits; every broken file or key is named."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from quire.data import check_batch
from quire.datasets.npz import NpzImages
from quire.errors import ConfigError, DataError


def saved(folder: Path, **arrays: np.ndarray) -> str:
    np.savez(folder / "set.npz", **arrays)
    return str(folder / "set.npz")


LABELS = np.arange(50) % 5


@pytest.mark.parametrize(
    ("array", "shape"),
    [
        (np.full((50, 6, 4), 51, np.uint8), (1, 6, 4)),
        (np.full((50, 6, 4, 3), 51, np.uint8), (3, 6, 4)),
        (np.full((50, 3, 6, 4), 51, np.uint8), (3, 6, 4)),
        (np.full((50, 6, 4), 0.2), (1, 6, 4)),
    ],
)
def test_layouts_become_float_channel_first(tmp_path: Path, array: np.ndarray, shape: tuple[int, ...]) -> None:
    data = NpzImages(saved(tmp_path, images=array, labels=LABELS), batch_size=10)
    batch = next(iter(data.loader("train", shuffle=True)))
    check_batch(batch)
    assert batch["image"].shape == (10, *shape) and batch["image"].dtype == torch.float32
    assert torch.allclose(batch["image"], torch.tensor(0.2))
    assert data.spec == {"image_size": list(shape[1:]), "channels": shape[0], "classes": 5}


def test_packed_bits_come_back_as_they_were(tmp_path: Path) -> None:
    ink = np.random.default_rng(0).random((50, 5, 7)) > 0.5
    path = saved(tmp_path, packed=np.packbits(ink.reshape(50, -1), axis=1), labels=LABELS)
    data = NpzImages(path, image_key="packed", packed=[5, 7], split="random")
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    found = torch.stack([data.dataset("test")[i]["image"][0] for i in range(10)])
    assert torch.equal(found, torch.from_numpy(ink[order[40:].numpy()]).float())


def test_split_is_in_proportion_to_the_classes_and_disjoint(tmp_path: Path) -> None:
    pixels = np.arange(50, dtype=np.uint8)[:, None, None].repeat(4, 1)
    path = saved(tmp_path, images=pixels, labels=LABELS)
    data = NpzImages(path, val_samples=10)
    parts = [data.dataset(n).tensors for n in ("train", "val", "test")]
    assert [p["label"].bincount().tolist() for p in parts] == [[6] * 5, [2] * 5, [2] * 5]
    seen = torch.cat([p["image"][:, 0, 0, 0] for p in parts])
    assert torch.equal(seen.sort().values, torch.arange(50, dtype=torch.uint8))


def test_string_labels_are_numbered_and_labels_may_be_missing(tmp_path: Path) -> None:
    path = saved(tmp_path, images=np.zeros((4, 2, 2), np.uint8), labels=np.array(["b", "a", "b", "a"]))
    assert NpzImages(path)._whole.tensors["label"].tolist() == [1, 0, 1, 0]
    bare = NpzImages(path, label_key=None)
    assert bare.fields == ("image", "index") and "label" not in bare.dataset("train")[0]
    assert "classes" not in bare.spec


def test_a_wrong_key_lists_the_right_ones(tmp_path: Path) -> None:
    path = saved(tmp_path, x=np.zeros((4, 2, 2), np.uint8), labels=LABELS[:4])
    with pytest.raises(ConfigError, match="has no array 'images'; it has x, labels"):
        NpzImages(path).dataset("train")


def test_missing_and_truncated_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no .npz file and no folder with exactly one"):
        NpzImages(str(tmp_path)).dataset("train")
    path = Path(saved(tmp_path, images=np.zeros((400, 9, 9), np.uint8), labels=np.arange(400) % 5))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"set.npz is truncated or no .npz"):
        NpzImages(str(path)).dataset("train")


@pytest.mark.parametrize(
    ("arrays", "arguments", "error", "said"),
    [
        ({"images": np.full((9, 2, 2), 200.0)}, {}, DataError, r"float64 in 200.0..200.0; store bytes"),
        ({"images": np.zeros((9, 2), np.uint8)}, {}, DataError, r"has shape \[9, 2\]; images are"),
        ({"images": np.zeros((9, 2, 2), np.uint8), "labels": LABELS[:8]}, {}, DataError, "must hold 9 integers"),
        ({"images": np.zeros((9, 2, 2), np.uint8), "labels": LABELS[:9] - 1}, {}, DataError, "must hold 9 integers"),
        ({"images": np.zeros((9, 3), np.uint8)}, {"packed": [5, 5]}, ConfigError, r"needs uint8 \[N, 4\]"),
    ],
)
def test_broken_content_is_refused(
    tmp_path: Path, arrays: dict, arguments: dict, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        NpzImages(saved(tmp_path, **{"labels": LABELS[:9], **arrays}), **arguments).dataset("train")


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_fraction_outside_its_range_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=r"data.test_fraction must be in \(0, 1\)"):
        NpzImages("x.npz", test_fraction=value)


def test_real_sets() -> None:
    root = Path(os.environ.get("QUIRE_DATA", ""), "")
    if not (root / "omniglot_small1").is_dir():
        pytest.skip("QUIRE_DATA holds no omniglot_small1")
    omniglot = NpzImages(
        "$QUIRE_DATA/omniglot_small1", image_key="packed", label_key="char_id", packed=[105, 105], size=28
    )
    assert omniglot.spec == {"image_size": [28, 28], "channels": 1, "classes": 136}
    check_batch(next(iter(omniglot.loader("train"))))
    assert omniglot.dataset("test").tensors["label"].bincount().tolist() == [4] * 136
    fashion = NpzImages("$QUIRE_DATA/fashion_mnist_sprite900", label_key="labels_by_row")
    assert fashion.spec == {"image_size": [28, 28], "channels": 1, "classes": 10}
    assert (len(fashion.dataset("train")), len(fashion.dataset("test"))) == (720, 180)
