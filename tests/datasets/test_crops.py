"""Crops and flips: one draw a sample, all aligned fields alike, labels never mixed."""

from __future__ import annotations

import pytest
import torch

from quire.datasets.crops import RandomFlip, RandomResizedCrop, read
from quire.errors import ConfigError


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def ramps(count=64, size=16):
    """An image whose two channels are the row and the column, and a map of the same at a quarter of the size."""
    at = (torch.arange(size) + 0.5) / size
    image = torch.stack(torch.meshgrid(at, at, indexing="ij")).expand(count, -1, -1, -1)
    small = torch.arange(size // 4) * 10
    return {"image": image, "semantic": (small[:, None] + torch.arange(size // 4)).expand(count, -1, -1)}


def test_fields_of_one_sample_get_one_box_and_samples_their_own():
    made = RandomResizedCrop([0.2, 0.6])(ramps(), stream())
    rows, columns = made["image"][:, 0], made["image"][:, 1]
    want = (rows[:, 2::4, 2::4] * 4).floor() * 10 + (columns[:, 2::4, 2::4] * 4).floor()
    assert (made["semantic"] == want).float().mean() > 0.7  # a cell of the map covers four rows of the image
    assert (made["semantic"] // 10 <= 3).all()  # no id that was not there
    assert rows.flatten(1).mean(1).std() > 0.05


def test_areas_and_ratios_stay_in_their_ranges():
    box = RandomResizedCrop([0.2, 0.5], [0.5, 2.0]).boxes(4000, 1.0, stream())
    area, ratio = box[:, 2] * box[:, 3], box[:, 2] / box[:, 3]
    whole = (box[:, 2] < 1) & (box[:, 3] < 1)  # those that were not clipped
    assert area.max() <= 0.5 + 1e-6
    assert area[whole].min() >= 0.2 - 1e-6
    assert ratio[whole].min() >= 0.5 - 1e-5
    assert ratio[whole].max() <= 2 + 1e-5
    assert (box[:, :2].abs() + box[:, 2:] <= 1 + 1e-6).all()  # inside the picture
    assert area[whole].mean().item() == pytest.approx(0.35, abs=0.01)


def test_ratio_is_of_pixels_on_a_picture_that_is_not_square():
    box = RandomResizedCrop([0.1, 0.1], [1.0, 1.0]).boxes(10, 48 / 96, stream())
    assert torch.allclose(box[:, 2] * 96, box[:, 3] * 48)


def test_the_whole_picture_is_left_as_it_is():
    batch = ramps(3)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(3, -1)
    assert torch.allclose(read(batch["image"], whole), batch["image"], atol=1e-6)
    assert torch.equal(read(batch["semantic"], whole), batch["semantic"])


def test_bicubic_is_the_cubic_resize_of_the_box_and_stays_within_the_sample():
    """Reading the left upper quarter at full size is what torch's bicubic resize of that quarter gives, edges aside."""
    image = torch.rand(2, 3, 16, 16, generator=stream())
    quarter = torch.tensor([[-0.5, -0.5, 0.5, 0.5]]).expand(2, -1)
    made = read(image, quarter, "bicubic")
    want = torch.nn.functional.interpolate(image, scale_factor=2, mode="bicubic", align_corners=False)[..., :16, :16]
    low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
    assert torch.allclose(made, want.clamp(low, high), atol=1e-5)
    assert not torch.allclose(made, read(image, quarter), atol=1e-2)
    steps = (torch.rand(4, 1, 16, 16, generator=stream()) > 0.5).float()  # cubic curves overshoot at these
    part = RandomResizedCrop([0.2, 0.6], interpolation="bicubic")
    cut = part({"image": steps, "semantic": torch.ones(4, 4, 4, dtype=torch.long)}, stream())
    assert cut["image"].min() >= 0 and cut["image"].max() <= 1 and (cut["semantic"] == 1).all()


def test_flips_mirror_every_field_of_the_chosen_samples():
    batch = {**ramps(400), "label": torch.arange(400), "index": torch.arange(400)}
    made = RandomFlip(0.25)(batch, stream())
    turned = (made["image"] != batch["image"]).flatten(1).any(1)
    assert turned.float().mean().item() == pytest.approx(0.25, abs=0.07)
    assert torch.equal(turned, (made["semantic"] != batch["semantic"]).flatten(1).any(1))
    assert torch.equal(made["image"][turned], batch["image"][turned].flip(-1))
    assert torch.equal(made["label"], batch["label"])
    assert torch.equal(RandomFlip(1.0)(batch, stream())["image"], batch["image"].flip(-1))


def test_same_seed_same_draws_and_a_batch_without_pictures_passes():
    part = RandomResizedCrop()
    assert torch.equal(part(ramps(), stream(3))["image"], part(ramps(), stream(3))["image"])
    words = {"tokens": torch.arange(6).view(2, 3)}
    assert part(words, stream()) is words
    assert RandomFlip()(words, stream()) is words


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: RandomResizedCrop([0.0, 1.0]), "scale must be two shares"),
        (lambda: RandomResizedCrop([0.5, 0.2]), "scale must be two shares"),
        (lambda: RandomResizedCrop(ratio=[2.0, 1.0]), "ratio must be two numbers"),
        (lambda: RandomResizedCrop(interpolation="area"), "interpolation is bilinear or bicubic, got 'area'"),
        (lambda: RandomFlip(1.5), r"p must be in \[0, 1\], got 1.5"),
    ],
)
def test_ranges_are_checked(made, said):
    with pytest.raises(ConfigError, match=said):
        made()
