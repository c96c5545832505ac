"""Codes to vectors, raw rows, and a split gathered from one or several processes."""

from __future__ import annotations

import pytest
import torch
from tests.core.toys import Line, Toy

from quire import ConfigError, DataError
from quire.contracts import Spec, build
from quire.roles.latent import LatentCodes, VectorCodes
from quire.roles.probes.features import Features, codes_of, pooled, read_tokens
from quire.roles.probes.knn import KNNProbe
from quire.roles.probes.raw import raw_tokens, raw_vector
from quire.roles.probes.subject import Subject, _without_weights, check_reads
from quire.roles.tokens import Layout, Segment, Tokens
from quire.roles.tokens.vit import ViTEncoder


def line():
    encoder = Line(out=4)
    torch.manual_seed(0)
    build(encoder, Spec(Toy().spec))
    return encoder.eval()


def subject(**kwargs):
    return Subject(line(), Toy(batch_size=32), torch.device("cpu"), **kwargs)


def some_tokens(prefix=1, padded=True):
    values = torch.randn(2, 4, 6)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool) if padded else None
    layout = Layout.of(Segment("words", (4,), (1,), "tokens"))
    return Tokens(values, torch.arange(4).expand(2, 4), layout, mask, torch.randn(2, prefix, 6))


def test_pooling_leaves_padding_and_prefix_out_of_the_mean():
    tokens = some_tokens()
    assert torch.allclose(pooled(tokens)[1], tokens.values[1, :2].mean(0))
    assert torch.equal(pooled(tokens, "class"), tokens.prefix[:, 0])


def test_vectors_latents_and_bare_matrices_have_a_vector_too():
    x = torch.randn(3, 5, 2)
    assert torch.equal(pooled(VectorCodes(x[:, 0])), x[:, 0])
    assert torch.equal(pooled(LatentCodes(x, (5,))), x.mean(1))
    assert torch.equal(pooled(x[:, 0]), x[:, 0])


@pytest.mark.parametrize(
    ("codes", "pooling", "said"),
    [
        (VectorCodes(torch.ones(1, 2)), "class", "pooling class needs a class token; the encoder gives VectorCodes"),
        (VectorCodes(torch.ones(1, 2)), "max", "pooling must be mean or class, got 'max'"),
        (some_tokens(prefix=0), "class", "needs a class token"),
        (torch.ones(2, 3, 4), "mean", "a vector per sample needs Tokens, VectorCodes or LatentCodes; got Tensor"),
    ],
)
def test_codes_that_have_no_such_vector_are_refused_by_name(codes, pooling, said):
    with pytest.raises(ConfigError, match=said):
        pooled(codes, pooling)


def test_tokens_are_read_with_their_prefix_and_a_mask_that_fits():
    values, mask = read_tokens(some_tokens())
    assert values.shape == (2, 5, 6) and mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert read_tokens(some_tokens(padded=False))[1] is None


def test_raw_pixels_are_themselves_and_large_images_are_averaged_down():
    small, large = torch.rand(2, 1, 8, 8), torch.rand(2, 3, 64, 96)
    assert torch.equal(raw_vector({"image": small}), small.flatten(1))
    assert raw_vector({"image": large}).shape == (2, 3 * 32 * 32)
    assert torch.allclose(raw_vector({"image": large}).mean(), large.mean(), atol=1e-5)


def test_raw_frames_and_tokens_do_not_see_padding():
    frames, mask = torch.randn(1, 50, 3), torch.arange(50)[None] < 32
    longer = torch.cat([frames, torch.full((1, 4, 3), 9.0)], 1)
    more = torch.cat([mask, torch.zeros(1, 4, dtype=torch.bool)], 1)
    found = raw_vector({"frames": frames, "mask": mask})
    assert torch.allclose(found, raw_vector({"frames": longer, "mask": more}))
    assert torch.allclose(found, raw_vector({"frames": frames[:, :32]}), atol=1e-5)
    assert torch.allclose(found[0, :3], frames[0, :2].mean(0), atol=1e-5)  # 32 frames in 16 stretches of 2
    short = raw_vector({"frames": frames[:, :5]})  # fewer frames than stretches: some are used twice
    assert torch.allclose(short[0, -3:], frames[0, 4], atol=1e-5) and torch.isfinite(short).all()
    ids = torch.tensor([[5, 5, 7, 0]])
    words = raw_vector({"tokens": ids, "mask": torch.tensor([[True, True, True, False]])})
    assert words[0, 5] == pytest.approx(2 / 3) and words[0, 7] == pytest.approx(1 / 3) and words[0, 0] == 0


def test_a_batch_without_raw_input_says_what_it_has():
    with pytest.raises(ConfigError, match="no raw row: a batch has label, none of image"):
        raw_vector({"label": torch.zeros(2)})


def test_raw_tokens_of_a_vision_encoder_are_its_patches():
    encoder = ViTEncoder(patch=[4, 2], width=8, depth=1, heads=2)
    image = torch.rand(2, 3, 8, 8)
    values, mask = raw_tokens({"image": image}, encoder)
    assert values.shape == (2, 2 * 4, 3 * 4 * 2) and mask is None


class Cut:
    """Stands for an encoder that cuts this field into five cells."""

    def __init__(self, field):
        self.field = field

    def layout(self, batch):
        return Layout.of(Segment("s", (5,), (1,), self.field))


def test_raw_frames_and_words_are_tokens_with_their_mask():
    mask = torch.tensor([[True, True, True, False, False]])
    frames = torch.randn(1, 5, 3)
    assert raw_tokens({"frames": frames, "mask": mask}, Cut("frames")) == (frames, mask)
    words, real = raw_tokens({"tokens": torch.tensor([[7, 8, 7, 0, 0]])}, Cut("tokens"))
    assert real.all() and torch.equal(words[0, 0], words[0, 2]) and not torch.equal(words[0, 0], words[0, 1])
    one, none = raw_tokens({"vector": torch.ones(2, 6)}, Cut("vector"))
    assert one.shape == (2, 1, 6) and none is None


def test_pieces_join_in_index_order_and_ragged_tokens_are_padded():
    a = Features(torch.ones(2, 3, 4), torch.tensor([5, 1]), label=torch.tensor([0, 1]))
    b = Features(2 * torch.ones(1, 2, 4), torch.tensor([3]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([2]))
    whole = Features.join([a, b])
    assert whole.index.tolist() == [1, 3, 5] and whole.label.tolist() == [1, 2, 0]
    assert whole.mask.sum(1).tolist() == [3, 2, 3]
    assert whole.values[1, 2].abs().sum() == 0


def test_two_processes_together_read_exactly_what_one_reads():
    read = lambda encoder: lambda batch: (encoder(batch), None)  # noqa: E731
    one = subject()
    whole = one.collect(read(one.encoder), "test")
    parts = []
    for rank in range(3):
        s = subject(rank=rank, world=3)
        parts.append(s._mine(read(s.encoder), "test", None))
    together = Features.join(parts)
    assert together.index.tolist() == list(range(50))
    assert torch.allclose(together.values, whole.values, atol=1e-6)
    assert torch.equal(together.label, whole.label)


def test_a_limit_draws_the_same_samples_again_and_encodes_only_them():
    seen = []

    def read(batch):
        seen.append(len(batch["vector"]))
        return batch["vector"], None

    first, second = (subject(seed=3).collect(read, "train", 40) for _ in range(2))
    assert torch.equal(first.index, second.index) and len(first) == 40 and sum(seen) == 80
    assert not torch.equal(first.index, subject(seed=4).collect(read, "train", 40).index)


def test_random_cuts_of_a_data_set_are_those_of_epoch_0_and_its_epoch_is_given_back():
    source = Toy(batch_size=16)
    data = source.dataset("train")
    data.epoch = 7
    seen = []

    def read(batch):
        seen.append(data.epoch)
        return batch["vector"], None

    Subject(line(), source, torch.device("cpu")).collect(read, "train")
    assert set(seen) == {0} and data.epoch == 7


def test_a_bad_label_is_named():
    bad = Features(torch.ones(2, 1), torch.tensor([4, 9]), label=torch.tensor([0, -2]))
    with pytest.raises(DataError, match="label of sample 9 is -2; classes count from 0"):
        bad.need_label(KNNProbe())
    with pytest.raises(DataError, match="KNNProbe reads the field label"):
        bad.unlabelled().need_label(KNNProbe())


def test_the_untrained_twin_has_other_weights_the_same_shapes_and_no_gradients():
    s = subject()
    twin = s.untrained()
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in s.encoder.state_dict().items()}
    assert not torch.equal(twin.linear.weight, s.encoder.linear.weight)
    assert torch.equal(twin.linear.weight, s.untrained().linear.weight)
    assert not twin.training and not any(p.requires_grad for p in twin.parameters())


def test_the_untrained_twin_fetches_no_weights():
    what = {"init_args": {"pretrained": True, "inner": [{"pretrained": True, "model": "x"}]}, "pretrained": {"a": 1}}
    assert _without_weights(what) == {
        "init_args": {"pretrained": False, "inner": [{"pretrained": False, "model": "x"}]},
        "pretrained": {"a": 1},
    }


def test_a_layer_is_only_read_of_an_encoder_that_offers_features():
    with pytest.raises(ConfigError, match=r"KNNProbe.layer needs 'features'; Line does not offer 'features'"):
        codes_of(line(), {"vector": torch.ones(1, 8)}, 0, KNNProbe())


def test_fields_that_the_data_does_not_offer_are_named():
    with pytest.raises(ConfigError, match="KNNProbe reads the field label; Toy offers vector"):
        check_reads(line(), ("vector",), "Toy", ("label",), KNNProbe())
    with pytest.raises(ConfigError, match="Line reads the field vector; Digits offers image, label"):
        check_reads(line(), ("image", "label"), "Digits", ("label",), KNNProbe())
