"""Data of several modalities: digits, scenes, paired files, stereo crops, pseudo labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from quire.__main__ import execute
from quire.datasets.crops import RandomFlip, RandomResizedCrop
from quire.errors import ConfigError, DataError
from quire_multimae.derived import DerivedModalities, quantize, sobel
from quire_multimae.digits import DigitModalities
from quire_multimae.files import read
from quire_multimae.folders import PairedFolders
from quire_multimae.shapes import Shapes, scenes


@pytest.fixture
def tree(tmp_path):
    """Two splits, two classes, image as RGBA or grey PNG, depth 16-bit, classes at a quarter of the size."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(4):
            name = f"{'ab'[i % 2]}/{i}"
            for modality in ("image", "depth", "semantic"):
                (tmp_path / split / modality / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (8, 12, 4), dtype=np.uint8)
            picture = Image.fromarray(pixels if i % 2 else pixels[..., 0])
            picture.save(tmp_path / split / "image" / f"{name}.png")
            depth = rng.integers(0, 65536, (8, 12)).astype(np.uint16)
            Image.fromarray(depth).save(tmp_path / split / "depth" / f"{name}.png")
            Image.fromarray(rng.integers(0, 5, (2, 3), dtype=np.uint8)).save(
                tmp_path / split / "semantic" / f"{name}.png"
            )
    return tmp_path


KINDS = {"image": "rgb", "depth": "depth", "semantic": "classes:5"}


def folders(tree, batch_size=4, **more):
    return PairedFolders(str(tree), KINDS, stride_levels={"semantic": 4}, batch_size=batch_size, **more)


def test_digits_have_exact_edges_and_levels():
    data = DigitModalities()
    sample = data.dataset("train")[0]
    assert sample["edges"].shape == (1, 8, 8) and sample["semantic"].dtype == torch.long
    assert torch.equal(sample["semantic"], quantize(sample["image"][None], 4)[0])
    flat = sobel(torch.full((1, 1, 5, 5), 0.7))
    assert flat.abs().max() < 1e-6
    step = torch.zeros(1, 1, 4, 4)
    step[..., 2:] = 1
    assert torch.isclose(sobel(step)[0, 0, 1, 1], torch.tensor(4 / (4 * 2**0.5)))


def test_derived_modalities_equal_the_data_module_s():
    image = DigitModalities().dataset("test")[3]["image"][None]
    found = DerivedModalities()({"image": image}, torch.Generator())
    wanted = DigitModalities().dataset("test")[3]["edges"]
    torch.testing.assert_close(found["edges"][0], wanted, atol=1e-6, rtol=1e-5)


def test_scenes_are_exact_and_the_same_for_the_same_seed():
    a, b = (scenes(16, (16, 24), 4, 1, 3) for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (a["depth"][:, 0][a["semantic"] == 0] > 8.9).all() and (a["depth"][:, 0][a["semantic"] > 0] < 8).all()
    assert a["image"].min() >= 0 and a["image"].max() <= 1
    data = Shapes(size=16, stride_level=4, length=8)
    assert data.dataset("train")[0]["semantic"].shape == (4, 4)
    assert data.spec["modalities"]["semantic"] == {"classes": 4, "size": [4, 4]}


def test_one_crop_and_flip_moves_all_modalities_alike():
    g = torch.Generator().manual_seed(0)
    made = scenes(8, (32, 32), 3, 1, 0)
    moved = RandomFlip(1.0)(RandomResizedCrop([1.0, 1.0], [1.0, 1.0])(made, g), g)
    assert torch.equal(moved["semantic"], made["semantic"].flip(-1))
    torch.testing.assert_close(moved["depth"], made["depth"].flip(-1), atol=1e-3, rtol=1e-3)


def test_paired_files_of_rgba_grey_and_16_bit_depth(tree):
    data = folders(tree)
    batch = next(iter(data.val_dataloader()))
    assert {k: list(v.shape) for k, v in batch.items() if k != "index"} == {
        "image": [4, 3, 8, 12],
        "depth": [4, 1, 8, 12],
        "semantic": [4, 2, 3],
        "label": [4],
    }
    raw = np.array(Image.open(tree / "val/depth/a/0.png"))
    torch.testing.assert_close(batch["depth"][0, 0], torch.from_numpy(raw.astype(np.float32)) / 65536)
    assert data.spec["classes"] == 2 and data.spec["image_size"] == [8, 12]
    assert data.spec["modalities"]["semantic"] == {"classes": 5, "size": [2, 3]}


def test_resizing_keeps_ids_and_places(tree):
    batch = next(iter(folders(tree, size=4).val_dataloader()))
    assert batch["image"].shape == (4, 3, 4, 4) and batch["semantic"].shape == (4, 1, 1)
    assert set(batch["semantic"].unique().tolist()) <= set(range(5))


def test_a_sample_without_one_modality_is_named_or_left_out(tree):
    (tree / "train/depth/b/1.png").unlink()
    with pytest.raises(DataError, match="1 of 4 train samples lack a modality, b/1 depth for one.*unpaired: skip"):
        folders(tree).dataset("train")
    with pytest.warns(UserWarning, match="left out"):
        assert len(folders(tree, unpaired="skip").dataset("train")) == 3


@pytest.mark.parametrize("modality", ["image", "depth"])
def test_a_file_cut_in_the_middle_of_an_epoch_is_named_or_its_sample_left_out(tree, modality):
    file = tree / "train" / modality / "a" / "2.png"
    file.write_bytes(file.read_bytes()[:60])
    seen = []
    batches = iter(folders(tree, batch_size=1).loader("train"))
    with pytest.raises(DataError, match=r"a/2.png can't be read .*set data.corrupt: skip"):
        seen.extend(int(batch["index"]) for batch in batches)
    assert seen == [0]  # a/0 came before it
    with pytest.warns(
        UserWarning, match=rf"1 of 4 train samples can't be read and are left out: \S*{modality}/a/2.png"
    ):
        data = folders(tree, corrupt="skip").dataset("train")
    assert len(data) == 3 and [f["image"].stem for f in data.files] == ["0", "1", "3"]
    with pytest.raises(ConfigError, match="data.corrupt error or skip, got error, error and drop"):
        folders(tree, corrupt="drop")


def test_depth_that_is_not_finite_is_counted_or_masked(tree):
    for file in (tree / "train/depth").rglob("*.png"):
        values = np.full((8, 12), 2.0, np.float32)
        values[0, :3] = np.inf
        np.save(file.with_suffix(".npy"), values)
        file.unlink()
    with pytest.raises(DataError, match="has 3 values that aren't finite: set data.missing: mask"):
        folders(tree).dataset("train")[0]
    sample = folders(tree, missing="mask").dataset("train")[0]
    assert (sample["depth"] == 2).all() and int((~sample["depth_valid"]).sum()) == 3


def test_wrong_files_are_one_sentence(tree):
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(tree / "train/depth/a/0.png")
    with pytest.raises(DataError, match="depth is 4x6 but image is 8x12; expected the same size at stride_level 1"):
        folders(tree).dataset("train")[0]
    Image.fromarray(np.full((2, 3), 7, np.uint8)).save(tree / "val/semantic/a/0.png")
    with pytest.raises(DataError, match="semantic has id 7 but classes=5"):
        folders(tree).dataset("val")[0]
    (tree / "val/image/a/0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="can't be read"):
        folders(tree).dataset("val")[0]
    with pytest.raises(ConfigError, match="must be rgb, grey, depth or classes:N"):
        PairedFolders(str(tree), {"image": "colour"})
    with pytest.raises(ConfigError, match="has no folder train"):
        PairedFolders(str(tree / "nowhere"), {"image": "rgb"}).dataset("train")


@pytest.mark.parametrize(("how", "kind"), [("sobel", "depth"), ("sharpness", "depth"), ("levels:4", "classes")])
def test_pseudo_labels_make_a_tree_that_paired_folders_reads(tree, how, kind, capsys):
    assert execute(["pseudo-label", str(tree), "--to", "made", "--with", how]) == 0
    assert "wrote 8 files of made" in capsys.readouterr().out
    value = read(tree / "train/made/a/0.png", kind)
    assert value.shape[-2:] == (8, 12)
    said = "classes:4" if kind == "classes" else kind
    sample = PairedFolders(str(tree), {"image": "rgb", "made": said}).dataset("train")[0]
    assert set(sample) == {"image", "made", "label"}
    assert execute(["pseudo-label", str(tree), "--to", "made", "--with", how]) == 0  # nothing is made twice
    assert "wrote 0 files" in capsys.readouterr().out


def test_pseudo_labels_from_any_callable_and_bad_input(tree, capsys):
    how = "quire_multimae.pseudo:sharpness"  # wants a batch: its answer is refused
    assert (
        execute(
            ["pseudo-label", str(tree), "--to", "x", "--with", "torchvision.transforms.functional:rgb_to_grayscale"]
        )
        == 0
    )
    for argv, said in (
        (["--to", "x", "--with", "magic"], "is not known"),
        (["--to", "image"], "choose another name"),
        (["--to", "x", "--from", "audio"], "has no split with a folder audio"),
        (["--to", "x", "--with", "nowhere:f"], "No module named"),
        (["--to", "y", "--with", how], ""),
    ):
        assert execute(["pseudo-label", str(tree), *argv]) != 0
        assert said in capsys.readouterr().err
