"""The method on small networks: who sees what, where gradients flow, what the losses are."""

from __future__ import annotations

import math

import pytest
import torch

from quire import ConfigError, Model
from quire.data import mix
from quire.roles.masking import BlockMask, RandomMask
from quire.roles.tokens.contract import gather
from quire.roles.tokens.reconstruct import PatchPixels
from quire.roles.tokens.vit import ViTEncoder
from quire_cae.decoder import MaskedTokenDecoder
from quire_cae.kmeans import KMeansPatches
from quire_cae.objective import ContextAutoencoding
from quire_cae.regressor import LatentRegressor

SPEC = {"image_size": [8, 8], "channels": 1}


def model_of(objective=None, decoder="own", drop_path=0.0, **more):
    encoder = ViTEncoder(2, 16, 2, 2, class_token=True, key_bias=False, layer_scale=0.1, drop_path=drop_path)
    objective = objective or ContextAutoencoding(
        LatentRegressor(1, heads=2), RandomMask(0.5), more.pop("target", PatchPixels()), pictures=0, **more
    )
    made = MaskedTokenDecoder(1, heads=2) if decoder == "own" else decoder
    model = Model(encoder=encoder, decoder=made, objective=objective, spec=SPEC)
    torch.manual_seed(0)
    model.configure_model()
    return model


def batch_of(rows=3):
    return {"image": torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(1))}


def clusters(count=5):
    return KMeansPatches(count)


def fitted(model):
    model.objective.target.fit(torch.rand(200, 4, generator=torch.Generator().manual_seed(2)))
    return model


def lengths(model, batch):
    """Tokens that enter the encoder's trunk, pass by pass."""
    seen = []
    hook = model.encoder.blocks[0].register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
    model.objective(model, batch)
    hook.remove()
    return seen


def test_the_encoder_sees_the_visible_tokens_and_then_only_the_masked_ones():
    model = model_of(ContextAutoencoding(LatentRegressor(1, heads=2), BlockMask(6, 2), PatchPixels(), pictures=0))
    assert lengths(model, batch_of()) == [11, 7]  # 10 visible and 6 masked of 16, each with a class token


def changed(batch, subset, masked):
    """The batch with other pixels in its masked, or in its visible, patches."""
    from quire.roles.tokens.patches import patchify, unpatchify

    hit = subset.kept() != masked
    other = torch.where(hit[..., None], 1 - patchify(batch["image"], (2, 2)), patchify(batch["image"], (2, 2)))
    return {"image": unpatchify(other, (4, 4), (2, 2))}


@pytest.mark.parametrize("masked", [True, False])
def test_each_pass_is_bit_invariant_to_the_other_s_pixels(masked):
    model, batch = model_of(), batch_of()
    subset = model.objective.draw(model, batch, torch.Generator().manual_seed(5))
    other = changed(batch, subset, masked)
    with torch.no_grad():
        for a, b in ((batch, other),):
            seen = [model.encoder(x, keep=subset).joined() for x in (a, b)]
            aims = [model.objective.aim(model.encoder, x, subset) for x in (a, b)]
    assert torch.equal(*seen) == masked
    assert torch.equal(*aims) != masked


def test_visible_pixels_reach_logits_only_through_the_regressor(monkeypatch):
    model, batch = model_of(), batch_of()
    subset = model.objective.draw(model, batch, torch.Generator().manual_seed(5))
    other = changed(batch, subset, masked=False)

    def logits(images):
        latents = model.objective.regressor(model.encoder(images, keep=subset), subset.rest)
        return model.decoder(latents, subset.rest, model.encoder.built_layout)

    with torch.no_grad():
        assert not torch.equal(logits(batch), logits(other))
        fixed = torch.rand(3, 8, 16)
        monkeypatch.setattr(model.objective.regressor, "forward", lambda visible, masked: fixed)
        assert torch.equal(logits(batch), logits(other))


def test_the_alignment_target_has_no_gradient_and_is_the_encoder_in_eval_mode():
    model, batch = model_of(drop_path=0.9), batch_of()
    model.train()
    losses = model.objective(model, batch)
    assert not losses.outputs["aim"].requires_grad
    assert all(m.training for m in model.encoder.modules())  # its mode came back
    model.eval()
    with torch.no_grad():
        alone = model.encoder(batch, keep=losses.outputs["subset"].rest).values
    assert (losses.outputs["aim"] - alone).abs().max() < 1e-6


def test_target_drop_path_keeps_the_training_mode_as_the_paper_s_code():
    model, batch = model_of(drop_path=0.9, target_drop_path=True), batch_of()
    model.train()
    subset = model.objective.draw(model, batch)
    aims = [model.objective.aim(model.encoder, batch, subset) for _ in range(4)]
    assert not all(torch.equal(aims[0], other) for other in aims[1:])


def test_alignment_is_the_mean_square_over_all_elements_and_zero_for_equal_latents(monkeypatch):
    model, batch = model_of(), batch_of()
    losses = model.objective(model, batch)
    difference = losses.outputs["latents"] - losses.outputs["aim"]
    assert losses["align"].item() == pytest.approx(difference.square().sum().item() / (3 * 8 * 16), rel=1e-5)
    subset = losses.outputs["subset"]
    aim = model.objective.aim(model.encoder, batch, subset)
    monkeypatch.setattr(model.objective.regressor, "forward", lambda visible, masked: aim)
    monkeypatch.setattr(model.objective, "draw", lambda *_: subset)
    assert model.objective(model, batch)["align"].item() == 0


def grads(model, batch):
    model.generator("cpu").manual_seed(mix(7))
    losses = model.objective(model, batch)
    total = sum(model.objective.weights.get(k, 1.0) * v for k, v in losses.items())
    model.zero_grad()
    total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_without_alignment_gradients_are_those_of_the_reconstruction_alone():
    model, batch = model_of(align_weight=0.0), batch_of()
    without = grads(model, batch)
    assert lengths(model, batch) == [9]  # no second pass
    twin = model_of(align_weight=2.0)
    twin.load_state_dict(model.state_dict())
    twin.generator("cpu").manual_seed(mix(7))
    twin.objective(twin, batch)["reconstruct"].backward()
    found = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    assert set(found) == set(without)
    assert all(torch.equal(found[n], without[n]) for n in found)


def test_both_terms_reach_the_encoder_and_the_sum_has_the_paper_s_weight():
    model, batch = model_of(), batch_of()
    assert model.objective.weights == {"align": 2.0}
    both = grads(model, batch)
    assert set(both) == {n for n, _ in model.named_parameters()}
    model.zero_grad()
    model.generator("cpu").manual_seed(mix(7))
    model.objective(model, batch)["align"].backward()
    reached = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert reached == {"encoder", "objective"}  # the decoder has no part in it


def test_the_class_token_gets_its_gradient_through_the_encoder_s_attention_only():
    model, batch = model_of(), batch_of()
    subset = model.objective.draw(model, batch)
    tokens = model.encoder(batch, keep=subset)
    prefix = tokens.prefix.detach().requires_grad_(True)
    latents = model.objective.regressor(tokens.with_values(tokens.values.detach(), prefix), subset.rest)
    model.decoder(latents, subset.rest, tokens.layout).square().sum().backward()
    assert prefix.grad is None  # regressor and decoder never look at it
    model.zero_grad()
    model.objective(model, batch)["reconstruct"].backward()
    assert model.encoder.prefix[0].grad.abs().sum() > 0


def test_cross_entropy_at_a_zero_head_is_ln_v():
    model = fitted(model_of(target=clusters()))
    torch.nn.init.zeros_(model.decoder.head.weight)
    losses = model.objective(model, batch_of())
    assert losses["reconstruct"].item() == pytest.approx(math.log(5), abs=1e-6)
    assert math.log(8192) == pytest.approx(9.0109, abs=1e-4)  # the paper's vocabulary
    assert model.objective.chance == {"accuracy": 0.2}
    assert set(losses.metrics) == {"accuracy", "majority", "target_std", "align_over_variance"}
    assert losses.metrics["accuracy"]() <= losses.metrics["majority"]() <= 1  # one constant guess can't beat it


def test_targets_of_masked_cells_are_those_of_their_places():
    model = fitted(model_of(target=clusters()))
    batch = batch_of()
    outputs = model.objective(model, batch).outputs
    whole = model.objective.target(batch, model.encoder.built_layout)
    assert torch.equal(outputs["target"], gather(whole, outputs["subset"].rest))
    assert outputs["prediction"].shape == (3, 8, 5)


def test_alignment_alone_has_no_decoder_and_brings_the_collapse_monitor():
    objective = ContextAutoencoding(LatentRegressor(1, heads=2), 0.5, reconstruct=False)
    model = model_of(objective, decoder=None)
    losses = model.objective(model, batch_of())
    assert set(losses) == {"align"}
    assert [type(c).__name__ for c in objective.callbacks()] == ["Health"]
    assert objective.health_targets(model, batch_of())["aim"].shape == (24, 16)


def test_masks_differ_by_row_and_come_from_the_step_s_generator():
    model, batch = model_of(), batch_of(16)
    draws = [model.objective.draw(model, batch, torch.Generator().manual_seed(s)).rest for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert len(draws[0].unique(dim=0)) > 10


def test_no_second_encoder_is_kept():
    names = [n for n, _ in model_of().state_dict().items()]
    assert not [n for n in names if "teacher" in n or "momentum" in n]
    assert len([n for n in names if n.endswith("stem.proj.weight")]) == 1


# ---- bad input
@pytest.mark.parametrize("masking", [RandomMask(0.0), BlockMask(16, 2)])
def test_a_mask_of_nothing_or_everything_is_refused(masking):
    model = model_of(ContextAutoencoding(LatentRegressor(1, heads=2), masking, PatchPixels()))
    with pytest.raises(ConfigError, match="the mask must leave at least one visible and one masked patch"):
        model.objective(model, batch_of())


def test_a_block_larger_than_what_is_masked_is_refused():
    model = model_of(ContextAutoencoding(LatentRegressor(1, heads=2), BlockMask(8, 16), PatchPixels()))
    with pytest.raises(ConfigError, match="min_block=16 exceeds the 8 cells to mask"):
        model.objective(model, batch_of())


def test_a_head_of_another_size_than_the_target_is_refused():
    decoder = MaskedTokenDecoder(1, heads=2, output_size=7)
    with pytest.raises(ConfigError, match="target has 5 codes but the head has 7"):
        model_of(decoder=decoder, target=clusters())


def test_a_decoder_of_another_width_than_the_latents_is_refused():
    with pytest.raises(ConfigError, match="MaskedTokenDecoder has width=8, the latents have 16"):
        model_of(decoder=MaskedTokenDecoder(1, width=8, heads=2))


def test_no_decoder_and_another_decoder_are_named():
    with pytest.raises(ConfigError, match="needs a MaskedTokenDecoder; model.decoder is not set: set one, or reconst"):
        model_of(decoder=None)
    from quire.roles.tokens.reconstruct import GridDecoder

    with pytest.raises(ConfigError, match="model.decoder is GridDecoder"):
        model_of(decoder=GridDecoder(16, 1, 2))


def test_nothing_to_learn_and_idle_arguments_are_refused():
    with pytest.raises(ConfigError, match="nothing to learn"):
        ContextAutoencoding(align_weight=0, reconstruct=False)
    with pytest.raises(ConfigError, match="reconstruct is false: drop one"):
        ContextAutoencoding(target=PatchPixels(), reconstruct=False)
    with pytest.raises(ConfigError, match="must be at least 0"):
        ContextAutoencoding(align_weight=-1)


def test_clusters_are_refused_before_they_are_fitted_or_when_there_are_too_few_patches():
    model = model_of(target=clusters())
    with pytest.raises(ConfigError, match="KMeansPatches has no centres yet"):
        model.objective(model, batch_of())
    with pytest.raises(ConfigError, match="clusters=5 exceeds the 2 different patches"):
        model.objective.target.fit(torch.eye(2, 4).repeat(50, 1))
    with pytest.raises(ConfigError, match="clusters of at least 2"):
        KMeansPatches(1)
