"""The method's oracles on a real encoder: what a token may know, what is trained, what is logged."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from quire import ConfigError, DataError, Model, Sum
from quire.data import check_batch
from quire.roles.tokens.contract import Subset
from quire.roles.tokens.frames import FrameEncoder
from quire.roles.tokens.vit import ViTEncoder
from quire_mp3.modules import PositionHead
from quire_mp3.objective import PositionPrediction

DIGITS = {"image_size": [8, 8], "channels": 1, "classes": 10}


def vit(**kwargs) -> ViTEncoder:
    return ViTEncoder(**{"patch": 2, "width": 24, "depth": 3, "heads": 4, "positions": "none", **kwargs})


def made(encoder=None, spec=None, decoder=None, objective=None, **kwargs) -> Model:
    torch.manual_seed(0)
    objective = objective or PositionPrediction(**kwargs)
    model = Model(encoder=encoder or vit(), decoder=decoder, objective=objective, spec=spec or DIGITS)
    model.configure_model()
    return model.eval()


def images(rows: int = 3, size: int = 8) -> torch.Tensor:
    return torch.rand(rows, 1, size, size, generator=torch.Generator().manual_seed(1))


def logits(model: Model, image: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    codes = model.encoder({"image": image}, context=None if keep is None else Subset.of(keep, 16))
    return model.objective.head(codes)


def shuffled(image: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    cells = image.unfold(2, 2, 2).unfold(3, 2, 2).reshape(len(image), 1, 16, 2, 2)[:, :, order]
    return cells.reshape(len(image), 1, 4, 4, 2, 2).transpose(3, 4).reshape(len(image), 1, 8, 8)


def some(rows: int, count: int = 8) -> torch.Tensor:
    return torch.rand(rows, 16, generator=torch.Generator().manual_seed(2)).argsort(1)[:, :count].sort(1).values


# ---- what a token may know
def test_logits_follow_their_tokens_when_the_patches_are_permuted():
    model, image, keep = made(), images(), some(3)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    moved = torch.argsort(order)[keep]  # where the context tokens went
    there = logits(model, shuffled(image, order), moved)
    assert (there - logits(model, image, keep)[:, order]).abs().max() < 1e-5


def test_the_permutation_check_is_not_blind():
    model, image = made(vit(positions="sincos"), objective=_Unchecked()), images()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    there = logits(model, shuffled(image, order), None)
    assert (there - logits(model, image, None)[:, order]).abs().max() > 1e-3


class _Unchecked(PositionPrediction):
    def check(self, model):
        pass


def test_non_context_tokens_do_not_see_each_other():
    model, image, keep = made(), images(1), some(1)
    outside = next(c for c in range(16) if c not in keep[0])
    row, column = 2 * (outside // 4), 2 * (outside % 4)
    changed = image.clone()
    changed[:, :, row : row + 2, column : column + 2] = 1 - changed[:, :, row : row + 2, column : column + 2]
    before, after = logits(model, image, keep)[0], logits(model, changed, keep)[0]
    others = [c for c in range(16) if c != outside]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[outside], after[outside])


def test_every_token_sees_the_context():
    model, keep = made(), some(1)
    image = images(1).requires_grad_()
    seen, asked = keep[0, 0].item(), next(c for c in range(16) if c not in keep[0])
    (slope,) = torch.autograd.grad(logits(model, image, keep)[0, asked].square().sum(), image)
    row, column = 2 * (seen // 4), 2 * (seen % 4)
    assert slope[0, 0, row : row + 2, column : column + 2].abs().max() > 0


def test_gathering_the_context_equals_masking_the_other_columns(monkeypatch):
    model, image, keep = made(), images(), some(3)
    gathered = logits(model, image, keep)
    columns = torch.full((3, 1, 1, 16), -math.inf).scatter(3, keep[:, None, None], 0.0)

    def masked(q, k, v, attn_mask=None, dropout_p=0.0, **_):
        return scaled_dot_product_attention(q, k, v, attn_mask=columns.expand(-1, q.shape[1], q.shape[2], -1))

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", masked)
    every = torch.arange(16).expand(3, -1)
    assert (logits(model, image, every) - gathered).abs().max() < 1e-5


def test_without_masking_it_is_the_plain_transformer():
    model, image = made(masking=0.0), images()
    guesses = model.objective.guess(model, {"image": image})
    assert torch.equal(guesses.logits, logits(model, image, None))
    assert torch.allclose(guesses.logits, logits(model, image, torch.arange(16).expand(3, -1)), atol=1e-5)
    assert guesses.context.all()


def test_a_frozen_context_takes_keys_from_the_embedded_tokens():
    model, image = made(context_update=False), images()
    batch = {"image": image}
    generator = torch.Generator().manual_seed(5)
    frozen = model.objective.guess(model, batch, generator)
    model.objective.context_update = True
    updated = model.objective.guess(model, batch, generator.manual_seed(5))
    assert torch.equal(frozen.context, updated.context)
    assert not torch.allclose(frozen.logits, updated.logits, atol=1e-4)
    single = made(vit(depth=1), context_update=False)  # with one layer there is no difference
    frozen = single.objective.guess(single, batch, generator.manual_seed(5))
    single.objective.context_update = True
    assert torch.allclose(frozen.logits, single.objective.guess(single, batch, generator.manual_seed(5)).logits)


def test_a_constant_image_is_placed_by_chance():
    model = made()
    losses = model.objective(model, {"image": torch.full((4, 1, 8, 8), 0.3)})
    guesses = losses.outputs["position"]
    assert (guesses.logits - guesses.logits[:, :1]).abs().max() < 1e-5
    assert losses.metrics["accuracy"]().item() == pytest.approx(1 / 16)
    assert losses.metrics["accuracy_over_chance"]().item() == pytest.approx(1.0)
    assert losses["position"] >= math.log(16)


def test_labels_are_the_cells_in_natural_order_also_with_a_class_token():
    for encoder in (vit(), vit(class_token=True)):
        model = made(encoder)
        guesses = model.objective.guess(model, {"image": images()})
        assert guesses.logits.shape == (3, 16, 16)
        assert torch.equal(guesses.cell, torch.arange(16).expand(3, -1))


# ---- what is trained
def test_no_position_parameter_exists_and_all_others_get_a_gradient():
    model = made().train()
    losses = model.objective(model, {"image": images()})
    losses["position"].backward()
    names = [n for n, _ in model.named_parameters()]
    assert not [n for n in names if "pos" in n or "places" in n or "table" in n]
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert model.objective.head.linear.weight.shape == (16, 24)


def test_the_heads_of_decoder_and_objective_are_never_both_there():
    own, given = made(), made(decoder=PositionHead(bias=False))
    assert own.objective.head is not None
    assert given.objective.head is None
    assert [n for n, _ in given.named_parameters() if "linear" in n] == ["decoder.linear.weight"]
    assert given.objective.guess(given, {"image": images()}).logits.shape == (3, 16, 16)


def test_smoothing_decays_in_training_and_is_off_in_evaluation(monkeypatch):
    model, batch, step = made(smoothing_sigma=1.0, smoothing_decay_steps=10), {"image": images()}, [0]
    monkeypatch.setattr(Model, "global_step", property(lambda self: step[0]))

    def loss() -> float:
        model.generator("cpu").manual_seed(7)
        return model.objective(model, batch)["position"].item()

    hard = loss()
    model.train()
    assert loss() != pytest.approx(hard, abs=1e-4)
    step[0] = 10
    assert loss() == pytest.approx(hard, abs=1e-6)


def test_a_seed_decides_the_context_and_steps_differ():
    model, batch = made(), {"image": images()}
    one = model.objective.guess(model, batch, torch.Generator().manual_seed(1))
    same = model.objective.guess(model, batch, torch.Generator().manual_seed(1))
    assert torch.equal(one.context, same.context)
    assert not torch.equal(model.objective.guess(model, batch).context, model.objective.guess(model, batch).context)


# ---- speech and text
SPEECH = {"frames": 20, "bands": 6, "classes": 2, "sample_rate": 8000}


def frames(rows: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    lengths = torch.tensor([20, 16, 10, 6])[:rows]
    mask = torch.arange(20) < lengths[:, None]
    audio = torch.rand(rows, 1600, generator=generator) * mask.repeat_interleave(80, 1)
    return {"frames": torch.randn(rows, 20, 6, generator=generator) * mask[..., None], "mask": mask, "audio": audio}


def ears(**kwargs) -> FrameEncoder:
    return FrameEncoder(**{"stack": 2, "width": 16, "depth": 2, "heads": 2, "positions": "none", **kwargs})


@pytest.mark.parametrize(("how", "masking"), [("random", 0.5), ("span", 0.5), ("random", 0.0)])
def test_padding_is_out_of_the_keys_and_the_loss(how, masking):
    model = made(ears(), SPEECH, context=how, masking=masking, span_length=2)
    batch, noisy = frames(), frames()
    noisy["frames"] = noisy["frames"] + 9 * (~noisy["mask"])[..., None]
    first = model.objective.guess(model, batch, torch.Generator().manual_seed(1))
    other = model.objective.guess(model, noisy, torch.Generator().manual_seed(1))
    assert first.real.sum(1).tolist() == [10, 8, 5, 3]
    assert torch.allclose(first.logits[first.real], other.logits[other.real], atol=1e-5)
    assert not (first.context & ~first.real).any()


def test_speech_logs_the_accuracy_on_voiced_frames():
    model, batch = made(ears(), SPEECH), frames()
    batch["audio"][:, :320] *= 1e-3  # the first two tokens of each are nearly silent
    losses = model.objective(model, batch)
    assert {"accuracy", "accuracy_context", "accuracy_rest", "accuracy_voiced"} <= set(losses.metrics)
    guesses = losses.outputs["position"]
    assert guesses.subsets["voiced"].sum(1).tolist() == [8, 6, 3, 1]
    assert 0 <= losses.metrics["accuracy_voiced"]() <= 1


def test_the_ends_of_a_text_are_not_asked_for():
    pytest.importorskip("quire.roles.tokens.text")
    from quire.roles.tokens.text import TextEncoder

    words = TextEncoder(width=16, depth=1, heads=2, positions="none", lm_head=False)
    model = made(words, {"vocab_size": 30, "length": 12})
    special = torch.zeros(2, 9, dtype=torch.bool)
    special[:, 0] = special[:, -1] = True
    ids = torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": ids, "mask": torch.ones(2, 9, dtype=torch.bool), "special": special}
    guesses = model.objective.guess(model, batch)
    assert guesses.real.sum(1).tolist() == [7, 7]
    assert guesses.logits.shape == (2, 9, 9)  # shorter than the longest text


# ---- what is logged
def test_images_log_chance_normalised_accuracies_and_the_distance():
    model = made()
    losses = model.objective(model, {"image": images()})
    values = {k: v().item() for k, v in losses.metrics.items()}
    assert set(values) == {
        "accuracy",
        "accuracy_context",
        "accuracy_rest",
        "accuracy_nonconstant",
        "accuracy_over_chance",
        "grid_distance",
    }
    assert values["accuracy_over_chance"] == pytest.approx(16 * values["accuracy"])
    assert values["accuracy"] == pytest.approx((values["accuracy_context"] + values["accuracy_rest"]) / 2)
    assert 0 < values["grid_distance"] <= 6
    assert "accuracy_rest" not in made(masking=0.0).objective(made(masking=0.0), {"image": images()}).metrics


def test_weight_and_sum():
    model = made(objective=Sum([PositionPrediction(weight=0.5), _Unchecked(masking=0.0)]))
    losses = model.objective(model, {"image": images()})
    assert set(losses) == {"position", "_Unchecked.position"}
    assert model.objective.weights["position"] == 0.5


# ---- bad input
@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"masking": 1.2}, r"masking must be in \[0,1\), got 1.2"),
        ({"masking": -0.1}, r"masking must be in \[0,1\), got -0.1"),
        ({"context": "cross"}, "context must be one of random, span, block, got 'cross'"),
        ({"span_length": 0}, "span_length must be at least 1, got 0"),
        ({"smoothing_sigma": -1.0}, "smoothing_sigma must be at least 0, got -1"),
        ({"pictures": -1}, "pictures must be at least 0, got -1"),
    ],
)
def test_wrong_arguments_are_named(kwargs, said):
    with pytest.raises(ConfigError, match=said):
        PositionPrediction(**kwargs)


def test_an_encoder_with_positions_is_refused_unless_it_is_frozen():
    with pytest.raises(ConfigError, match=r"encoder ViTEncoder adds positions \(sincos\); set positions: none"):
        made(vit(positions="sincos"))
    with pytest.raises(ConfigError, match=r"encoder FrameEncoder adds positions \(learned\); set positions: none"):
        made(ears(positions="learned"), SPEECH)
    judged = vit(positions="sincos")
    judged.frozen = True
    assert made(judged).objective.guess  # the head as a probe


def test_another_image_size_is_refused():
    said = "the position head has 16 classes but the input gives 64 tokens; rebuild the head or resize the images"
    model = made()
    with pytest.raises(ConfigError, match=said):
        model.objective(model, {"image": images(size=16)})


def test_a_recording_of_padding_only_is_named():
    model, batch = made(ears(), SPEECH), frames()
    batch["mask"][3] = False
    with pytest.raises(DataError, match="sample 3 has no real frames"):
        model.objective(model, batch)
    with pytest.raises(DataError, match="sample 3 has no real frames"):
        check_batch(batch)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (math.nan, "image of sample 2 is not finite"),
        (200.0, r"image is in 0..255; the field is float in \[0,1\] \(first such sample: 2\)"),
        (-3.0, r"image is in -3\.\..*; the field is float in \[0,1\] \(first such sample: 2\)"),
    ],
)
def test_broken_pixels_are_named_with_sample_and_range(value, said):
    image = images()
    image[2, 0, 0, 0] = value
    with pytest.raises(DataError, match=said):
        check_batch({"image": image})
