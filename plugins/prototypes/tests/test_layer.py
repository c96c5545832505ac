"""Oracles of the paper's layer and terms (numbers worked by hand in the spec, section 7)."""

import pytest
import torch

from quire.contracts import Spec, build
from quire.errors import ConfigError, DataError
from quire.roles.latent import Classifier, PixelDecoder, VectorCodes
from quire.roles.latent.conv import ConvVectorDecoder
from quire.roles.latent.mlp import MlpVectorDecoder
from quire_prototypes.distances import r1, r2, squared_distances
from quire_prototypes.modules import PrototypeLayer, check_finite
from quire_prototypes.objective import summed_error


def layer(width=6, classes=4, size=8, **given):
    torch.manual_seed(0)
    made = PrototypeLayer(**given)
    spec = {"image_size": [size, size], "channels": 1, "classes": classes, "codes": {"width": width}}
    build(made, Spec(spec))
    return made


def codes(rows=5, width=6):
    return VectorCodes(torch.rand(rows, width, generator=torch.Generator().manual_seed(1)))


def test_distances_r1_and_r2_of_the_worked_example():
    """Oracle 1: a swapped axis would fail, since n = 3 and m = 2."""
    features, prototypes = torch.tensor([[0.0, 0], [1, 0], [0, 2]]), torch.tensor([[0.0, 0], [3, 0]])
    distances = squared_distances(features, prototypes)
    assert distances.tolist() == [[0, 9], [1, 4], [4, 13]]
    assert r1(distances).item() == 2
    assert r2(distances).item() == pytest.approx(5 / 3)


def test_r1_vanishes_on_examples_and_r2_on_prototypes():
    """Oracle 2, values."""
    few, many = codes(3).vector, codes(7).vector
    many[:3] = few
    assert r1(squared_distances(many, few)) == 0
    assert r2(squared_distances(few, many)) == 0


def test_r1_pulls_each_prototype_and_one_example_and_nothing_else():
    """Oracle 2, gradients: exactly zero elsewhere."""
    features, prototypes = codes(9).vector.requires_grad_(), (codes(3).vector * 2 + 1).requires_grad_()
    distances = squared_distances(features, prototypes)
    r1(distances).backward()
    assert (prototypes.grad.abs().sum(1) > 0).all()
    assert set(features.grad.abs().sum(1).nonzero()[:, 0].tolist()) == set(distances.argmin(0).tolist())


def test_distances_are_never_negative_however_near_or_far_from_the_origin():
    points = torch.rand(50, 40) + 1e3
    distances = squared_distances(points, points + 1e-4 * torch.rand(50, 40))
    assert (distances >= 0).all() and (squared_distances(points, points).diagonal() == 0).all()


def test_contributions_sum_to_the_logit():
    """Oracle 3, tolerance 1e-6."""
    made, seen = layer(), codes()
    why = made.explain(seen)
    logit = why.logits.gather(1, why.prediction[:, None])[:, 0]
    torch.testing.assert_close(why.contribution.sum(1), logit, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(made(seen), why.logits)
    assert (why.distance.diff(dim=1) >= 0).all(), "nearest first"
    first = made.distances(seen).argmin(1)
    assert torch.equal(why.prototype[:, 0], first)
    assert torch.equal(why.weight[:, 0], made.class_weights[first, why.prediction])


def test_permuting_prototypes_with_their_weights_leaves_logits():
    """Oracle 4."""
    made, seen = layer(), codes()
    before, order = made(seen), torch.randperm(made.count)
    made.prototypes.data, made.class_weights.data = made.prototypes.data[order], made.class_weights.data[order]
    torch.testing.assert_close(made(seen), before)


@pytest.mark.parametrize("decoder", [MlpVectorDecoder(widths=[16]), ConvVectorDecoder(channels=[8, 2])])
def test_decoded_prototypes_have_the_image_shape_and_range(decoder):
    """Oracle 6."""
    pictures = layer(width=8, decoder=decoder).pictures()
    assert pictures.shape == (15, 1, 8, 8)
    assert pictures.min() >= 0 and pictures.max() <= 1


def test_reconstruction_error_is_summed_over_pixels():
    """Oracle 8: zeros against ones, 28x28: 784."""
    assert summed_error(torch.zeros(5, 1, 28, 28), torch.ones(5, 1, 28, 28)) == 784


def test_the_class_of_a_prototype_is_its_most_negative_weight():
    made = layer(prototypes=4)
    made.class_weights.data = torch.tensor([[0.0, 5, -1, 1], [-9, 0, 0, 8], [1, 2, 3, 4], [0, 0, 9, -0.1]])
    assert made.owners().tolist() == [2, 0, 0, 3]
    assert made.explain(codes()).owner.shape == (5, 4)


def test_prototypes_and_weights_start_uniform_and_there_is_no_bias():
    made = layer(prototypes=40)
    for tensor in (made.prototypes, made.class_weights):
        assert tensor.min() >= 0 and tensor.max() <= 1 and 0.4 < tensor.mean() < 0.6
    assert {name for name, _ in made.named_parameters()} == {"prototypes", "class_weights"}
    assert torch.equal(made(VectorCodes(torch.zeros(1, 6))), made.prototypes.square().sum(1)[None] @ made.class_weights)


def test_assigned_weights_give_every_class_a_prototype():
    made = layer(prototypes=6, weight_init="assigned")
    assert made.owners().tolist() == [0, 1, 2, 3, 0, 1]


def test_one_layer_serves_two_roles():
    made = layer(decoder=MlpVectorDecoder(widths=[16]))
    assert made.role(Classifier) is made
    assert made.role(PixelDecoder) is made.decoder
    assert layer().role(PixelDecoder) is None


def test_distances_stay_in_single_precision_under_half_precision_codes():
    made = layer()
    assert made(VectorCodes(codes().vector.bfloat16())).dtype == torch.float32


# ---- bad input
@pytest.mark.parametrize("count", [0, -3])
def test_no_prototypes_are_refused(count):
    with pytest.raises(ConfigError, match=f"^prototypes must be positive, got {count}$"):
        PrototypeLayer(prototypes=count)


@pytest.mark.parametrize("given", [{"init": "zeros"}, {"weight_init": "normal"}])
def test_unknown_starts_are_refused(given):
    with pytest.raises(ConfigError, match="must be uniform"):
        PrototypeLayer(**given)


def test_fewer_prototypes_than_classes_warn():
    with pytest.warns(UserWarning, match="7 prototypes for 10 classes: some classes cannot own one"):
        layer(prototypes=7, classes=10)


def test_a_trained_decoder_of_another_width_is_refused():
    decoder = MlpVectorDecoder(widths=[16])
    build(decoder, Spec({"image_size": [8, 8], "channels": 1, "codes": {"width": 40}}))
    with pytest.raises(ConfigError, match="^decoder expects 40 features, prototypes have 64$"):
        layer(width=64, decoder=decoder)


def test_pictures_without_a_pixel_decoder_say_what_is_needed():
    with pytest.raises(ConfigError, match="PixelDecoder in PrototypeLayer.decoder, which is not set"):
        layer().pictures()


def test_non_finite_distances_name_the_first_bad_sample():
    distances = torch.ones(4, 2)
    distances[2, 1] = float("nan")
    distances[3, 0] = float("inf")
    with pytest.raises(DataError, match=r"first for sample 2 \(index 12\) of the batch"):
        check_finite(distances, torch.arange(10, 14))
