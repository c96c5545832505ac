"""ElasticDeformation against scipy, its identities, and what it does in a run."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, map_coordinates

from quire.data import DataModule, Fields
from quire.errors import ConfigError
from quire_prototypes.transforms import ElasticDeformation, deform, smooth


def images(count=3, channels=1, height=28, width=28):
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(28, 28), (8, 8), (20, 32)])
def test_deformation_agrees_with_scipy_on_one_fixed_displacement(size):
    """Oracle 9 of the spec; the reference is gaussian_filter(mode=constant) and map_coordinates(order=1)."""
    height, width = size
    image = images(1, 1, height, width)
    noise = np.random.default_rng(1).uniform(-1, 1, (2, height, width))
    field = [20 * gaussian_filter(n, 4, mode="constant") for n in noise]
    rows, columns = np.mgrid[0:height, 0:width]
    wanted = map_coordinates(image[0, 0].numpy(), [rows + field[0], columns + field[1]], order=1)

    ours = 20 * smooth(torch.from_numpy(noise)[None], 4.0)
    np.testing.assert_allclose(ours[0].numpy(), np.stack(field), atol=1e-9)
    np.testing.assert_allclose(deform(image, ours.float())[0, 0].numpy(), wanted, atol=1e-4)
    assert np.abs(wanted - image[0, 0].numpy()).max() > 0.1, "the field must move something"


def test_alpha_zero_is_the_identity():
    """Oracle 9, second half."""
    batch = {"image": images()}
    out = ElasticDeformation(alpha=0)(batch, torch.Generator().manual_seed(0))
    assert torch.equal(out["image"], batch["image"])
    torch.testing.assert_close(deform(batch["image"], torch.zeros(3, 2, 28, 28)), batch["image"])


def test_the_range_and_other_fields_stay():
    batch = {"image": images(channels=3), "label": torch.arange(3)}
    out = ElasticDeformation()(batch, torch.Generator().manual_seed(0))
    assert out["image"].shape == (3, 3, 28, 28)
    assert out["image"].min() >= 0 and out["image"].max() <= 1
    assert torch.equal(out["label"], batch["label"])


def test_same_generator_same_field_and_channels_move_together():
    image = images(2, 1).expand(2, 3, 28, 28)
    one, two = (ElasticDeformation()({"image": image}, torch.Generator().manual_seed(5))["image"] for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(one[:, 0], one[:, 2])
    other = ElasticDeformation()({"image": image}, torch.Generator().manual_seed(6))["image"]
    assert not torch.equal(one, other)


def test_p_leaves_that_share_of_images_alone():
    image = images(200, 1, 8, 8)
    out = ElasticDeformation(sigma=1, alpha=2, p=0.25)({"image": image}, torch.Generator().manual_seed(0))["image"]
    moved = (out != image).flatten(1).any(1).float().mean()
    assert 0.15 < moved < 0.35


def test_evaluation_batches_are_not_deformed():
    class Data(DataModule):
        fields = ("image", "index")

        def split(self, name):
            return Fields(image=images())

        def sizes(self):
            return {"image_size": [28, 28], "channels": 1}

    data, batch, generator = (
        Data(batch_size=1, transforms=[ElasticDeformation()]),
        {"image": images()},
        torch.Generator(),
    )
    assert data.transform(batch, generator, training=False)["image"] is batch["image"]
    assert not torch.equal(data.transform(batch, generator, training=True)["image"], batch["image"])


@pytest.mark.parametrize("given", [{"sigma": 0}, {"alpha": -1}, {"p": 1.5}])
def test_impossible_arguments_are_refused(given):
    with pytest.raises(ConfigError, match="ElasticDeformation needs"):
        ElasticDeformation(**given)
