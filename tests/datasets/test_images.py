"""Digits and TorchvisionImages: splits, ranges, offline reading, and what is said when files are broken."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from quire.data import check_batch, expand
from quire.datasets.images import Digits, TorchvisionImages
from quire.errors import ConfigError, DataError


def write_idx(file: Path, array: np.ndarray, packed: bool = False) -> None:
    content = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(content) if packed else content)


def mnist_images() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {prefix: draw.integers(0, 256, (n, 6, 5), dtype=np.uint8) for prefix, n in (("train", 40), ("t10k", 20))}


def write_mnist(folder: Path, packed: bool = False) -> None:
    end = ".gz" if packed else ""
    for prefix, images in mnist_images().items():
        write_idx(folder / f"{prefix}-images-idx3-ubyte{end}", images, packed)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{end}", np.arange(len(images), dtype=np.uint8) % 4, packed)


def test_expand_knows_the_data_folder_home_and_names_an_unset_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QUIRE_DATA", str(tmp_path))
    assert expand("$QUIRE_DATA/mnist") == expand("${QUIRE_DATA}/mnist") == tmp_path / "mnist"
    monkeypatch.delenv("QUIRE_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert expand("$QUIRE_DATA/mnist") == tmp_path / "cache" / "quire" / "mnist"
    assert expand("~/x") == Path.home() / "x"
    with pytest.raises(ConfigError, match="NO_SUCH_VARIABLE, which is not set"):
        expand("$NO_SUCH_VARIABLE/x")


def test_digits_split_is_the_permutation_seeded_0_whatever_the_seed() -> None:
    from sklearn.datasets import load_digits

    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))  # role-tokens section 7
    pixels = torch.from_numpy(load_digits().images).float()[:, None] / 16
    data = Digits(seed=5)
    train, test = data.dataset("train").tensors, data.dataset("test").tensors
    assert torch.equal(train["image"], pixels[order[:1400]])
    assert torch.equal(test["image"], pixels[order[1400:]])
    assert float(train["image"].max()) == 1 and float(train["image"].min()) == 0
    assert data.spec == {"image_size": [8, 8], "channels": 1, "classes": 10}


def test_stratified_digits_hold_out_a_quarter_of_every_class() -> None:
    data = Digits(split="stratified")
    train, test = data.dataset("train"), data.dataset("test")
    assert (len(train), len(test)) == (1347, 450)  # prototypes section 5
    share = test.tensors["label"].bincount() / (train.tensors["label"].bincount() + test.tensors["label"].bincount())
    assert float((share - 450 / 1797).abs().max()) < 0.005


def test_validation_samples_come_from_training_and_never_from_test() -> None:
    data = Digits(val_samples=200)
    rows = [{tuple(r.flatten().tolist()) for r in data.dataset(n).tensors["image"]} for n in ("train", "val", "test")]
    assert [len(data.dataset(n)) for n in ("train", "val", "test")] == [1200, 200, 397]
    whole = {tuple(r.flatten().tolist()) for r in Digits().dataset("train").tensors["image"]}
    assert rows[0] | rows[1] == whole and rows[1] <= whole
    plain = Digits()
    assert plain.dataset("val") is plain.dataset("test")
    with pytest.raises(ConfigError, match="val_samples is 1400, but there are 1400 training samples"):
        Digits(val_samples=1400).dataset("train")


def test_digits_can_be_larger_and_coloured() -> None:
    data = Digits(size=[28, 20], channels=3)
    batch = next(iter(data.loader("train", shuffle=True)))
    check_batch(batch)
    assert batch["image"].shape == (64, 3, 28, 20)
    assert torch.equal(batch["image"][:, 0], batch["image"][:, 2])
    assert data.spec["image_size"] == [28, 20] and data.spec["channels"] == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"split": "half"}, "data.split must be random or stratified"),
        ({"size": 0}, "data.size must be one or two positive numbers"),
        ({"channels": 2}, r"data.channels must be 1 \(grey\) or 3 \(RGB\), got 2"),
        ({"val_samples": -1}, "data.val_samples must be at least 0"),
    ],
)
def test_digits_refuse_bad_arguments(arguments: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Digits(**arguments)


@pytest.mark.parametrize("place", ["", "raw", "MNIST/raw"])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read_offline_raw_or_gzipped(tmp_path: Path, place: str, packed: bool) -> None:
    write_mnist(tmp_path / place, packed)
    data = TorchvisionImages("MNIST", root=str(tmp_path), batch_size=8)
    batch = next(iter(data.loader("test")))
    check_batch(batch)
    assert torch.equal(batch["image"][:, 0], torch.from_numpy(mnist_images()["t10k"][:8]) / 255)
    assert data.spec == {"image_size": [6, 5], "channels": 1, "classes": 4}
    assert [len(data.dataset(n)) for n in ("train", "test")] == [40, 20]


def test_a_broken_idx_file_is_named(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte is truncated or too long: 1193 bytes of 1200"):
        TorchvisionImages("MNIST", root=str(tmp_path)).dataset("train")
    file.write_bytes(b"not an idx file")
    with pytest.raises(DataError, match="is not an IDX file"):
        TorchvisionImages("MNIST", root=str(tmp_path)).dataset("train")
    file.unlink()
    with pytest.raises(ConfigError, match=r"has no train-images-idx3-ubyte \(or train-images-idx3-ubyte.gz\)"):
        TorchvisionImages("MNIST", root=str(tmp_path)).dataset("train")


def test_a_truncated_gzip_is_named(tmp_path: Path) -> None:
    write_mnist(tmp_path, packed=True)
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte.gz is truncated"):
        TorchvisionImages("MNIST", root=str(tmp_path)).dataset("test")


def test_missing_sets_and_unknown_names_are_refused_in_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(ConfigError, match=r"no complete MNIST under .* set data.root, or data.download: true") as error:
        TorchvisionImages("MNIST", root=str(tmp_path), download=False).dataset("train")
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"torchvision has no set CIFAR11; did you mean CIFAR1"):
        TorchvisionImages("CIFAR11", root=str(tmp_path), download=False).dataset("train")
    with pytest.raises(ConfigError, match="torchvision's FakeData takes no colour"):
        TorchvisionImages("FakeData", options={"colour": 1}).dataset("train")


def test_sets_that_are_decoded_one_by_one_work_too() -> None:
    pytest.importorskip("torchvision")
    data = TorchvisionImages(
        "FakeData",
        download=False,
        size=6,
        val_samples=10,
        batch_size=8,
        options={"size": 100, "image_size": [3, 9, 12], "num_classes": 3},
    )
    batch = next(iter(data.loader("train", shuffle=True)))
    check_batch(batch)
    assert batch["image"].shape == (8, 3, 6, 6) and batch["label"].dtype == torch.int64
    assert [len(data.dataset(n)) for n in ("train", "val", "test")] == [80, 10, 10]  # it has no split of its own
    assert data.spec == {"image_size": [6, 6], "channels": 3, "classes": 3}


def test_sets_in_memory_become_bytes_channel_first(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")

    class CIFAR10:
        def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
            self.data = np.zeros((30 if train else 10, 8, 8, 3), np.uint8)
            self.data[:, 0, 0] = (255, 0, 51)
            self.targets = [i % 5 for i in range(len(self.data))]

    monkeypatch.setattr(datasets, "CIFAR10", CIFAR10)
    data = TorchvisionImages("CIFAR10", val_samples=10, batch_size=5)
    batch = next(iter(data.loader("train", shuffle=True)))
    assert torch.allclose(batch["image"][0, :, 0, 0], torch.tensor([1.0, 0.0, 0.2]))
    assert data.dataset("val").tensors["label"].bincount().tolist() == [2] * 5
    grey = TorchvisionImages("CIFAR10", channels=1).dataset("test")[0]["image"]
    assert grey.shape == (1, 8, 8) and float(grey[0, 0, 0]) == pytest.approx(0.299 + 0.2 * 0.114)


def test_a_failed_download_names_set_folder_and_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")

    class SVHN:
        def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
            raise OSError("<urlopen error no route to host>")

    monkeypatch.setattr(datasets, "SVHN", SVHN)
    with pytest.raises(DataError, match=r"SVHN under .* can't be read or fetched \(<urlopen error"):
        TorchvisionImages("SVHN", root=str(tmp_path)).dataset("train")


def test_train_samples_are_balanced_after_validation_is_set_apart() -> None:
    data = Digits(val_samples=100, train_samples=50)
    assert data.dataset("train").tensors["label"].bincount().tolist() == [5] * 10


def test_real_mnist(real: Path) -> None:
    data = TorchvisionImages("MNIST", root=str(real / "mnist"), val_samples=5000)
    assert [len(data.dataset(n)) for n in ("train", "val", "test")] == [55000, 5000, 10000]
    assert data.spec == {"image_size": [28, 28], "channels": 1, "classes": 10}
    whole = TorchvisionImages("MNIST", root=str(real / "mnist"))
    batch = next(iter(whole.loader("train")))
    check_batch(batch)
    assert batch["label"][:5].tolist() == [5, 0, 4, 1, 9]  # the first training digits of MNIST


@pytest.fixture
def real() -> Path:
    root = Path(os.environ.get("QUIRE_DATA", ""), "")
    if not (root / "mnist").is_dir():
        pytest.skip("QUIRE_DATA holds no mnist")
    return root
