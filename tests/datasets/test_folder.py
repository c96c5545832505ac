"""ImageFolder and SampleImages: layouts, corrupt files, and crops that depend on (seed, epoch, place) alone."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from quire.data import check_batch
from quire.datasets.folder import ImageFolder
from quire.datasets.samples import SampleImages
from quire.errors import ConfigError, DataError


def draw(file: Path, size: tuple[int, int] = (12, 9), seed: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(file)
    return file


def classes_in(root: Path, count: int = 10) -> Path:
    for name in ("b", "a"):
        for i in range(count):
            draw(root / name / f"{i}.png", seed=i)
    return root


def test_class_folders_give_labels_in_the_order_of_their_names(tmp_path: Path) -> None:
    data = ImageFolder(str(classes_in(tmp_path)), size=6, batch_size=4, test_fraction=0.2)
    assert data.classes == ["a", "b"] and data.fields == ("image", "label", "index")
    assert [len(data.dataset(n)) for n in ("train", "test")] == [16, 4]
    assert data.dataset("test").labels.bincount().tolist() == [2, 2]
    batch = next(iter(data.loader("train", shuffle=True)))
    check_batch(batch)
    assert batch["image"].shape == (4, 3, 6, 6)
    assert data.spec == {"image_size": [6, 6], "channels": 3, "classes": 2}


def test_a_flat_folder_has_no_labels_and_a_fixed_split(tmp_path: Path) -> None:
    for i in range(10):
        draw(tmp_path / f"{i}.png", seed=i)
    (tmp_path / "README.md").write_text("not an image")
    data, again = (ImageFolder(str(tmp_path), size=6, seed=s) for s in (0, 1))
    assert data.fields == ("image", "index") and "label" not in data.dataset("train")[0]
    assert torch.equal(data.dataset("test").places, again.dataset("test").places)
    assert not set(data.dataset("test").places.tolist()) & set(data.dataset("train").places.tolist())


def test_train_and_test_folders_are_the_split(tmp_path: Path) -> None:
    classes_in(tmp_path / "train", 3)
    classes_in(tmp_path / "val", 2)
    data = ImageFolder(str(tmp_path), size=6, val_samples=2)
    assert [len(data.dataset(n)) for n in ("train", "val", "test")] == [4, 2, 4]
    draw(tmp_path / "val" / "c" / "0.png")
    with pytest.raises(DataError, match="the test folder has the class 'c', which the training folder lacks"):
        ImageFolder(str(tmp_path), size=6).dataset("test")


def test_several_folders_are_joined(tmp_path: Path) -> None:
    for i in range(4):
        draw(tmp_path / "x" / f"{i}.png")
        draw(tmp_path / "y" / f"{i}.png")
    data = ImageFolder([str(tmp_path / "x"), str(tmp_path / "y")], size=6, test_fraction=0.25)
    assert [len(data.dataset(n)) for n in ("train", "test")] == [6, 2]


def test_crop_keeps_the_aspect_and_stretch_does_not(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255  # the middle third is white
    for i in range(2):
        Image.fromarray(wide).save(tmp_path / f"{i}.png")
    crop = ImageFolder(str(tmp_path), size=8, fit="crop", channels=1).dataset("train")[0]["image"]
    stretch = ImageFolder(str(tmp_path), size=8, fit="stretch", channels=1).dataset("train")[0]["image"]
    assert crop.shape == stretch.shape == (1, 8, 8)
    assert float(crop.min()) == pytest.approx(1, abs=1e-5) and float(stretch[0, 0, 0]) == 0


def test_random_crops_depend_on_seed_epoch_and_place_alone(tmp_path: Path) -> None:
    for i in range(4):
        draw(tmp_path / f"{i}.png", (40, 40), i)
    given = {"root": str(tmp_path), "size": 8, "fit": "random", "crops": 5, "test_fraction": 0.25}
    data, again, other = ImageFolder(**given), ImageFolder(**given), ImageFolder(**given, seed=1)
    a, b, c = (d.dataset("train") for d in (data, again, other))
    assert len(a) == 15 and len(data.dataset("test")) == 1
    torch.manual_seed(7)
    first = torch.stack([a[i]["image"] for i in range(15)])
    torch.manual_seed(8)
    assert torch.equal(first, torch.stack([b[i]["image"] for i in reversed(range(15))]).flip(0))
    assert not torch.equal(first[0], first[3]) and not torch.equal(first[0], c[0]["image"])  # one image, two crops
    a.epoch = 1
    assert not torch.equal(first, torch.stack([a[i]["image"] for i in range(15)]))
    held = data.dataset("test")
    fixed = held[0]["image"]
    held.epoch = 1
    assert torch.equal(fixed, held[0]["image"])


def test_corrupt_files_stop_or_are_named_and_counted(tmp_path: Path) -> None:
    for i in range(10):
        draw(tmp_path / f"{i}.png", seed=i)
    for i in (2, 5):
        file = tmp_path / f"{i}.png"
        file.write_bytes(file.read_bytes()[:80])
    data = ImageFolder(str(tmp_path), size=6, test_fraction=0.2)
    with pytest.raises(DataError, match=r"[25].png can't be read as an image .* set data.corrupt: skip"):
        _ = [list(data.loader(part)) for part in ("train", "test")]
    lenient = ImageFolder(str(tmp_path), size=6, test_fraction=0.2, corrupt="skip")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        total = sum(len(lenient.dataset(n)) for n in ("train", "test"))
    assert total == 8
    text = " ".join(str(w.message) for w in said)
    assert "2.png" in text and "5.png" in text and "can't be read and are left out" in text
    for part in ("train", "test"):
        list(lenient.loader(part))


def test_a_file_cut_between_others_stops_the_epoch_at_its_batch_and_is_named(tmp_path: Path) -> None:
    for i in range(10):
        draw(tmp_path / f"{i}.png", seed=i)
    data = ImageFolder(str(tmp_path), size=6, batch_size=2, test_fraction=0.2)
    bad = data.dataset("train").source.files[int(data.dataset("train").places[5])]
    bad.write_bytes(bad.read_bytes()[:80])
    seen = []
    with pytest.raises(DataError, match=rf"{bad.name} can't be read as an image .* set data.corrupt: skip"):
        seen.extend(i for batch in data.loader("train") for i in batch["index"].tolist())
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("channels", [1, 3])
def test_rgba_grey_and_palette_files_become_the_channels_asked_for(tmp_path: Path, channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    grey = Image.fromarray(values)
    colour = Image.merge("RGB", [grey] * 3)
    see_through = colour.copy()
    see_through.putalpha(Image.fromarray(255 - values))
    for name, image in (("a", grey), ("b", colour), ("c", see_through), ("d", see_through.convert("LA"))):
        image.save(tmp_path / f"{name}.png")
    grey.convert("P").save(tmp_path / "e.png")
    data = ImageFolder(str(tmp_path), channels=channels, test_fraction=0.2, batch_size=8)
    found = torch.cat([b["image"] for part in ("train", "test") for b in data.loader(part)])
    want = torch.from_numpy(values).float().div(255).expand(5, channels, -1, -1)
    torch.testing.assert_close(found, want, atol=1.1 / 255, rtol=0)  # alpha is left away; rounding of one step


def test_images_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    for i in range(6):
        draw(tmp_path / f"{i}.png", (12, 9) if i % 2 else (9, 12), i)
    with pytest.raises(DataError, match=r"differ in size, 9x12 and 12x9: set data.size"):
        list(ImageFolder(str(tmp_path), test_fraction=0.2).loader("train"))


def test_sixteen_bit_images_are_refused(tmp_path: Path) -> None:
    for i in range(2):
        Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / f"{i}.png")
    with pytest.raises(DataError, match="more than 8 bits: convert it to 8 bits"):
        ImageFolder(str(tmp_path), size=4).dataset("train")[0]


def test_missing_empty_and_mixed_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder .*nowhere"):
        ImageFolder(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty holds no image"):
        ImageFolder(str(tmp_path / "empty"))
    classes_in(tmp_path / "mixed", 2)
    draw(tmp_path / "mixed" / "stray.png")
    with pytest.raises(ConfigError, match="stray.png lies beside class folders"):
        ImageFolder(str(tmp_path / "mixed"))


def test_samples_are_photographs_in_every_install() -> None:
    data = SampleImages(size=24, length=40, batch_size=8)
    batch = next(iter(data.loader("train", shuffle=True)))
    check_batch(batch)
    assert batch["image"].shape == (8, 3, 24, 24)
    assert [len(data.dataset(n)) for n in ("train", "val", "test")] == [40, 10, 10]
    assert data.spec == {"image_size": [24, 24], "channels": 3}
    assert float(batch["image"].std()) > 0.05


def test_sample_splits_share_no_pixel() -> None:
    data = SampleImages()
    names, photos = data._photos
    assert names == ["china.jpg", "flower.jpg"]
    covered = sum(
        data.dataset(n).source.read(0)[0].numel() for n in ("train", "val", "test")
    )  # three disjoint regions make up the photograph
    assert covered == photos[0].numel()
    train, val, test = (data.dataset(n).source.read(0)[0] for n in ("train", "val", "test"))
    assert torch.equal(torch.cat([train, torch.cat([val, test], 1)], 2), photos[0])


def test_training_crops_change_with_the_epoch_and_only_they() -> None:
    data = SampleImages(size=8, length=16)
    for name, changes in (("train", True), ("val", False)):
        crops = data.dataset(name)
        before = [s["image"] for s in (crops[0], crops[1])]
        crops.epoch = 3
        after = [s["image"] for s in (crops[0], crops[1])]
        assert torch.equal(torch.stack(before), torch.stack(after)) is not changes


def test_too_large_crops_name_the_photograph() -> None:
    with pytest.raises(ConfigError, match=r"china.jpg offers \d+x\d+ pixels, too few for crops of 300x300"):
        SampleImages(size=300).dataset("val")[0]


def test_scikit_image_samples_or_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    data = SampleImages(source="all", size=16)
    assert len(data.dataset("train").source.names) >= 10
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install scikit-image, or set data.source: sklearn"):
        SampleImages(source="skimage").dataset("train")
