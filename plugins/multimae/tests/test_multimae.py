"""Encoder, decoder and objective: the oracles of the paper's algorithm, and bad input."""

from __future__ import annotations

import pytest
import torch

from quire.contracts import Spec, build
from quire.errors import ConfigError, DataError
from quire.model import Model
from quire.roles.tokens.contract import Subset
from quire.roles.tokens.reconstruct import GridDecoder, MaskedReconstruction, PatchPixels
from quire_multimae.adapters import ClassMapAdapter, PatchAdapter
from quire_multimae.decoder import MultiTaskDecoder
from quire_multimae.encoder import MultiModalViT
from quire_multimae.masking import DirichletMask
from quire_multimae.objective import MaskedMultiTask
from quire_multimae.sampler import CrossModal

SPEC = Spec(
    {"image_size": [8, 12], "channels": 1, "modalities": {"depth": {"channels": 1}, "semantic": {"classes": 5}}}
)
SMALL = {"width": 16, "depth": 2, "heads": 2}


def modalities(names=("image", "depth", "semantic")):
    made = {
        "image": lambda: PatchAdapter(4, mean=0.5, std=0.5),
        "depth": lambda: PatchAdapter(4),
        "semantic": lambda: ClassMapAdapter(4, 2, embed_dim=6),
    }
    return {n: made[n]() for n in names}


def batch(rows=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "image": torch.rand(rows, 1, 8, 12, generator=g),
        "depth": torch.randn(rows, 1, 8, 12, generator=g),
        "semantic": torch.randint(5, (rows, 4, 6), generator=g),
    }


def model(names=("image", "depth", "semantic"), objective=None, decoder=None, seed=0, **encoder):
    torch.manual_seed(seed)
    made = Model(
        encoder=MultiModalViT(modalities(names), **{**SMALL, **encoder}),
        decoder=decoder or MultiTaskDecoder(width=16, heads=2, depth=1),
        objective=objective or MaskedMultiTask(masking=DirichletMask(6), pictures=0),
        spec=SPEC,
    )
    made.configure_model()
    return made.eval()


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_of_the_reference_sizes_exactly():
    spec = Spec(
        {
            "image_size": [224, 224],
            "channels": 3,
            "modalities": {"depth": {"channels": 1}, "semantic": {"classes": 133}},
        }
    )
    adapters = {"image": PatchAdapter(16), "depth": PatchAdapter(16), "semantic": ClassMapAdapter(16, 4)}
    encoder = MultiModalViT(adapters)
    decoder = MultiTaskDecoder({"rgb": "image", "norm_rgb": "image", "depth": "depth", "semantic": "semantic"})
    build(encoder, spec)
    build(decoder, Spec({**spec, "codes": encoder.sizes()}))
    assert encoder.built_layout.cells == 588
    assert count(encoder.blocks) == 85_054_464
    assert [count(a) for a in encoder.adapters.values()] == [590_592, 197_376, 795_712]
    found = {task: count(d) for task, d in decoder.decoders.items()}
    assert found == {"rgb": 2_765_056, "norm_rgb": 2_765_056, "depth": 2_633_472, "semantic": 3_114_576}
    assert count(encoder) + count(decoder) == 97_917_072  # about 97.92 M


def test_masked_pixels_and_classes_never_reach_the_encoder():
    made = model()
    one, other = batch(), batch(seed=9)
    subset = DirichletMask(6).draw(made.encoder.layout(one), 3, None, torch.Generator().manual_seed(1))
    mixed = {}
    for s in made.encoder.layout(one).segments:
        kept = subset.kept()[:, s.start : s.stop].reshape(3, *s.grid)
        kept = kept.repeat_interleave(s.patch[0], 1).repeat_interleave(s.patch[1], 2)
        mixed[s.field] = torch.where(kept if one[s.field].ndim == 3 else kept[:, None], one[s.field], other[s.field])
    a, b = made.encoder(one, keep=subset), made.encoder(mixed, keep=subset)
    assert torch.equal(a.values, b.values) and torch.equal(a.prefix, b.prefix)


def test_order_of_modalities_permutes_and_does_not_change_outputs():
    first = model()
    second = model(("semantic", "image", "depth"))
    state = {k: v for k, v in first.encoder.state_dict().items()}
    second.encoder.load_state_dict(state)
    a, b = first.encoder(batch()), second.encoder(batch())
    for s in a.layout.segments:
        t = next(t for t in b.layout.segments if t.name == s.name)
        torch.testing.assert_close(a.values[:, s.start : s.stop], b.values[:, t.start : t.stop], atol=1e-5, rtol=0)


@pytest.mark.parametrize("visible_too", [False, True])
def test_targets_at_visible_cells_do_not_count_unless_asked(visible_too):
    """What the encoder saw is judged or not by the objective's own draw, seen in its outputs."""
    made = model(objective=MaskedMultiTask(masking=DirichletMask(9), loss_on_visible=visible_too, pictures=0))
    data = batch()
    made._rekey("val", 0, 0)
    losses = made.objective(made, data)
    subset, predictions = losses.outputs["subset"], losses.outputs["predictions"]
    touched = 0
    for s in made.encoder.layout(data).segments:
        kept = subset.kept()[:, s.start : s.stop].reshape(3, *s.grid)
        assert kept.any() and not kept.all()
        kept = kept.repeat_interleave(s.patch[0], 1).repeat_interleave(s.patch[1], 2)
        kept = kept if data[s.field].ndim == 3 else kept[:, None]
        for where, counts in ((kept, visible_too), (~kept, True)):
            value = (data[s.field] + 1) % 5 if s.field == "semantic" else 1 - data[s.field]
            changed = {**data, s.field: torch.where(where, value, data[s.field])}
            judged = _judged(made, predictions, changed)
            assert (judged[s.name] != losses[s.name]) == counts, (s.name, counts)
            touched += 1
    assert touched == 6


def _judged(made, predictions, data):
    """The objective's losses of another batch for the same predictions and the same draw."""
    made._rekey("val", 0, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made.decoder, "forward", lambda *_: predictions)
        return made.objective(made, data)


def test_absent_modalities_work_one_by_one():
    made = model()
    whole = batch()
    for name in whole:
        found = made.encoder({name: whole[name]})
        assert found.layout.only().name == name
        predictions = made.decoder(found)
        assert {k: list(v.shape) for k, v in predictions.items()} == {
            "image": [3, 6, 16],
            "depth": [3, 6, 16],
            "semantic": [3, 6, 20],
        }
        losses = made.objective(made, {name: whole[name]} if name == "image" else {**whole})
        assert all(torch.isfinite(v) for v in losses.values())


def test_a_fully_visible_modality_and_zero_masked_tokens_add_no_loss_and_keep_the_graph():
    made = model(objective=MaskedMultiTask(masking=DirichletMask(10, forced={"image": 6}), pictures=0))
    losses = made.objective(made, batch())
    assert float(losses["image"].detach()) == 0 and float(losses["depth"].detach()) > 0
    made = model(objective=MaskedMultiTask(masking=DirichletMask(18), pictures=0))
    losses = made.objective(made, batch())
    total = sum(losses.values())
    total.backward()
    assert float(total.detach()) == 0
    assert all(torch.isfinite(p.grad).all() for p in made.parameters() if p.grad is not None)


def test_an_odd_grid_trains():
    spec = Spec({**SPEC, "image_size": [12, 20]})  # 3x5 cells a modality
    made = Model(
        encoder=MultiModalViT(modalities(), **SMALL),
        decoder=MultiTaskDecoder(width=16, heads=2, depth=1),
        objective=MaskedMultiTask(masking=DirichletMask(7), pictures=0),
        spec=spec,
    )
    made.configure_model()
    data = {
        "image": torch.rand(2, 1, 12, 20),
        "depth": torch.rand(2, 1, 12, 20),
        "semantic": torch.randint(5, (2, 6, 10)),
    }
    losses = made.objective(made, data)
    sum(losses.values()).backward()
    assert losses.outputs["codes"].values.shape[1] == 7
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in made.parameters())


def test_all_tokens_of_one_modality_dropped():
    made = model(objective=MaskedMultiTask(masking=DirichletMask(6, forced={"image": 0}), pictures=0))
    losses = made.objective(made, batch())
    assert all(torch.isfinite(v) for v in losses.values())


def test_one_modality_equals_the_independent_masked_autoencoder_s_loss():
    objective = MaskedMultiTask({"image": {"loss": "mse", "target": "patch_norm"}}, DirichletMask(2), pictures=0)
    made = model(("image",), objective, GridDecoder(16, 1, 2, output_size=16))
    control = MaskedReconstruction(DirichletMask(2), PatchPixels(True))
    control.eval()
    data = {"image": batch()["image"]}
    made._rekey("val", 0, 0)
    ours = made.objective(made, data)["image"]
    made._rekey("val", 0, 0)
    theirs = control(made, data)["reconstruction"]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)  # adapters normalise first: eps weighs differently


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_any_number_of_global_tokens(tokens):
    made = model(global_tokens=tokens)
    assert made.encoder(batch()).prefix.shape[1] == tokens
    assert all(torch.isfinite(v) for v in made.objective(made, batch()).values())
    assert all(p.ndim == 1 for p in getattr(made.encoder, "prefix", []))  # no weight decay


def test_patch_normalised_target_oracle_and_constant_patches():
    # patch 0..11: unbiased variance 13, mean 5.5 -> first three -1.5254, -1.2481, -0.9707 [V]
    spec = Spec({"image_size": [2, 2], "channels": 3})
    objective = MaskedMultiTask({"image": {"target": "patch_norm"}}, DirichletMask(1), pictures=0)
    encoder = MultiModalViT({"image": PatchAdapter(2)}, **SMALL)
    made = Model(encoder=encoder, decoder=MultiTaskDecoder(width=16, heads=2, depth=1), objective=objective, spec=spec)
    made.configure_model()
    from quire_multimae.objective import _target

    task, adapter = objective.tasks["image"], objective.outputs["image"]
    image = torch.arange(12.0).reshape(1, 3, 2, 2)
    found, _ = _target(task, adapter, {"image": image})
    torch.testing.assert_close(found[0, 0, :3], torch.tensor([-1.5254, -1.2481, -0.9707]), atol=1e-4, rtol=0)
    flat, _ = _target(task, adapter, {"image": torch.full((1, 3, 2, 2), 0.3)})
    assert torch.isfinite(flat).all() and flat.abs().max() < 1e-3


def test_there_is_no_residual_round_the_cross_attention():
    made = model()
    decoder = made.decoder.decoders["image"]
    with torch.no_grad():
        decoder.cross.proj.weight.zero_()
        decoder.cross.proj.bias.zero_()
    a = made.decoder(made.encoder(batch()))["image"]
    assert (a - a[:, :1]).abs().max() < 1e-6  # nothing but the attention's output goes on


def test_outputs_that_are_not_inputs_and_task_queries_off():
    extra = MultiTaskDecoder({"image": "image", "depth": PatchAdapter(4)}, 16, 2, 1, task_queries=False)
    made = model(("image",), MaskedMultiTask(masking=DirichletMask(2), pictures=0), extra)
    losses = made.objective(made, batch())
    assert set(losses) == {"image", "depth"} and float(losses["depth"].detach()) > 0


def test_pixels_that_are_not_measured_count_in_no_loss():
    made = model()
    data = batch()
    valid = torch.ones(3, 8, 12, dtype=torch.bool)
    valid[1] = False  # a sample without any depth
    predicted = torch.zeros(3, 6, 16)
    found, _ = made.objective.loss("depth", predicted, {**data, "depth_valid": valid}, None)
    wanted = data["depth"][[0, 2]].abs().mean()
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_uncertainty_learns_a_variance_a_task():
    made = model(objective=MaskedMultiTask(masking=DirichletMask(6), balance="uncertainty", pictures=0))
    losses = made.objective(made, batch())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in made.objective.log_variance.values())


def test_grids_may_differ_by_modality_and_places_agree():
    adapters = {"image": PatchAdapter(2), "depth": PatchAdapter(4)}
    encoder = MultiModalViT(adapters, **SMALL)
    build(encoder, SPEC)
    assert [s.grid for s in encoder.built_layout.segments] == [(4, 6), (2, 3)]
    assert encoder(batch()).values.shape == (3, 30, 16)


def test_cross_modal_needs_only_what_is_shown():
    made = model()
    made.sampler = CrossModal({"depth": "all", "image": 0.5})
    data = batch()
    found = made.sampler(made, data)
    assert {k: list(v.shape) for k, v in found.items()} == {
        "image": [3, 1, 8, 12],
        "depth": [3, 1, 8, 12],
        "semantic": [3, 4, 6],
    }
    alone = CrossModal({"depth": "all"})(made, {"depth": data["depth"]})
    assert found["semantic"].dtype == torch.long and alone["image"].shape == (3, 1, 8, 12)
    with pytest.raises(ConfigError, match="CrossModal shows image, which the batch lacks"):
        CrossModal()(made, {"depth": data["depth"]})
    with pytest.raises(ConfigError, match="visible.image must be all, none or a share"):
        CrossModal({"image": "some"})
    with pytest.raises(ConfigError, match="shows nothing"):
        CrossModal({"image": "none"})._shares(["image"])


@pytest.mark.parametrize("tokens", [0, 1, 3])
@torch.no_grad()
def test_one_modality_goes_to_timm_with_the_same_answers(tokens):
    from timm.models.vision_transformer import VisionTransformer

    spec = Spec({"image_size": [8, 12], "channels": 3})
    adapters = {
        "edges": PatchAdapter(4, channels=1, mean=0.2),
        "image": PatchAdapter(4, mean=[0.1, 0.2, 0.3], std=0.5),
        "semantic": ClassMapAdapter(4, 2, classes=3),
    }
    encoder = MultiModalViT(adapters, global_tokens=tokens, final_norm=tokens == 1, **SMALL)
    build(encoder, spec)
    encoder.eval()
    for name, channels in (("image", 3), ("edges", 1)):
        weights = encoder.to_timm(name)
        vit = VisionTransformer(**weights.arguments).eval()
        vit.load_state_dict(weights.state, strict=True)
        value = torch.rand(2, channels, 8, 12)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (weights.mean, weights.std))
        want = encoder({name: value}).joined()
        torch.testing.assert_close(vit.forward_features((value - mean) / std), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="'semantic' is no modality with a PatchAdapter; there are: edges, image"):
        encoder.to_timm("semantic")


def test_a_timm_vit_goes_in():
    from timm.models.vision_transformer import VisionTransformer

    from quire_multimae.convert import from_timm

    shape = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
    vit, spec, image = (
        VisionTransformer(**shape).eval(),
        Spec({"image_size": [8, 8], "channels": 3}),
        torch.rand(2, 3, 8, 8),
    )
    first, other = (MultiModalViT({"image": PatchAdapter(4)}, final_norm=True, **SMALL) for _ in range(2))
    build(first, spec)
    build(other, spec)
    vit.load_state_dict(first.to_timm().state)
    from_timm(other, vit.state_dict())
    want = vit.forward_features(image)
    torch.testing.assert_close(other.eval()({"image": image}).joined(), want, atol=1e-5, rtol=1e-5)


def layout_of(data, **more):
    made = model(**more)
    return made.encoder(data)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"depth": torch.rand(3, 1, 4, 12)},
            "depth is 4x12 but image is 8x12; expected the same size at stride_level 1",
        ),
        ({"semantic": torch.zeros(3, 8, 12, dtype=torch.long)}, "semantic is 8x12 but image is 8x12; expected 4x6"),
        ({"semantic": torch.full((3, 4, 6), 5)}, "semantic has id 5 but classes=5"),
        ({"semantic": torch.full((3, 4, 6), 255)}, "semantic has id 255 but classes=5; .*ignore_index"),
        ({"depth": torch.full((3, 1, 8, 12), torch.nan)}, "depth has 288 non-finite values.*missing: mask"),
        ({"image": torch.rand(3, 3, 8, 12)}, "image has 3 channels"),
        ({"semantic": torch.rand(3, 4, 6)}, "a class map is int64"),
        ({"image": torch.zeros(3, 1, 8, 12, dtype=torch.uint8)}, "image is uint8"),
    ],
)
def test_bad_batches_are_one_sentence(change, said):
    with pytest.raises((ConfigError, DataError), match=said):
        layout_of({**batch(), **change})


def test_bad_configs_are_one_sentence():
    with pytest.raises(ConfigError, match="batch has none of: image, depth, semantic"):
        layout_of({"label": torch.zeros(3)})
    with pytest.raises(ConfigError, match="task 'normals' has no decoder; tasks: image, depth, semantic"):
        model(objective=MaskedMultiTask({"normals": "l1"}, pictures=0))
    with pytest.raises(ConfigError, match="30x30 is not divisible by patch 4"):
        build(MultiModalViT({"image": PatchAdapter(4)}, **SMALL), Spec({"image_size": [30, 30], "channels": 1}))
    with pytest.raises(ConfigError, match="loss=ce, but image holds numbers"):
        model(objective=MaskedMultiTask({"image": "ce"}, pictures=0))
    with pytest.raises(ConfigError, match="predicts 'normals', which the encoder lacks"):
        model(decoder=MultiTaskDecoder({"normals": "normals"}, 16, 2, 1))
    with pytest.raises(ConfigError, match="modalities is empty"):
        MultiModalViT({})


def test_an_ignored_id_has_a_row_of_zeros_and_no_loss():
    spec = Spec({"image_size": [8, 8], "channels": 1})
    adapter = ClassMapAdapter(4, 1, classes=3, embed_dim=4, ignore_index=255)
    encoder = MultiModalViT({"semantic": adapter}, **SMALL)
    objective = MaskedMultiTask(masking=DirichletMask(1), pictures=0)
    made = Model(encoder=encoder, decoder=MultiTaskDecoder(width=16, heads=2, depth=1), objective=objective, spec=spec)
    made.configure_model()
    ids = torch.full((2, 8, 8), 255)
    losses = made.objective(made, {"semantic": ids})
    assert float(losses["semantic"].detach()) == 0
    assert not adapter.vectors.weight[3].any()


def test_subset_of_another_size_is_refused():
    with pytest.raises(ConfigError, match="drawn for 5 cells"):
        model().encoder(batch(), keep=Subset.of(torch.zeros(3, 1, dtype=torch.long), 5))
