"""Targets: histograms against scikit-image, frozen networks from files, and a tokenizer trained here."""

from __future__ import annotations

import os
import sys
import types

import pytest
import torch

from quire import ConfigError, Model, Spec
from quire.checkpoint import Pretrained, export
from quire.contracts import build
from quire.roles.reconstruction import Reconstruction
from quire.roles.tokens.contract import Layout, Segment
from quire_cae.clip import ClipTarget
from quire_cae.convert import convert, main, weights
from quire_cae.dalle import DalleTokenizer, DvaeEncoder
from quire_cae.hog import HogTarget
from quire_cae.kmeans import KMeansPatches
from quire_cae.vq import PatchTokenDecoder, PatchTokenizer, TokenizerIds


def layout_of(grid=(2, 3), patch=(4, 4), field="image"):
    return Layout.of(Segment(field, grid, patch, field))


def spec_of(layout, values=16):
    return Spec({"codes": {"width": 16, "segments": layout.plain(), "patch_values": values}})


def made(part, layout=None):
    build(part, spec_of(layout or layout_of()))
    return part


def image(height=8, width=12, channels=3, rows=2, seed=0):
    return {"image": torch.rand(rows, channels, height, width, generator=torch.Generator().manual_seed(seed))}


# ---- edges
@pytest.mark.parametrize(("patch", "cells"), [((4, 4), 1), ((16, 16), 4)])
def test_histograms_are_scikit_image_s(patch, cells):
    hog = pytest.importorskip("skimage.feature").hog
    layout, batch = layout_of((2, 3), patch), image(2 * patch[0], 3 * patch[1])
    target = made(HogTarget(), layout)
    found = target(batch, layout)
    assert found.shape == (2, 6, 9 * cells)
    assert target.size(spec_of(layout)) == 9 * cells
    side = min(8, patch[0])
    given = {"pixels_per_cell": (side, side), "cells_per_block": (1, 1), "block_norm": "L2", "channel_axis": -1}
    wanted = torch.from_numpy(hog(batch["image"][0].permute(1, 2, 0).numpy(), feature_vector=False, **given))
    whole = wanted[:, :, 0, 0]  # cells down, cells across, bins
    down = patch[0] // side
    by_patch = whole.unflatten(0, (2, down)).unflatten(2, (3, down)).permute(0, 2, 4, 1, 3).reshape(6, -1)
    assert (found[0] - by_patch).abs().max() < 2e-2  # scikit-image's epsilon and bin edges in degrees
    assert (found[0] - by_patch).abs().mean() < 1e-3


def test_histograms_need_image_patches():
    layout = Layout.of(Segment("speech", (5,), (2,), "frames"))
    with pytest.raises(ConfigError, match="HogTarget needs image patches; segment 'speech' is cut from frames"):
        HogTarget()({"frames": torch.rand(1, 10, 4)}, layout)


# ---- clusters
def test_ids_are_those_of_the_nearest_centre_and_paint_gives_it_back():
    target, layout = made(KMeansPatches(3)), layout_of()
    centres = torch.stack([torch.full((16,), v) for v in (0.0, 0.5, 1.0)])
    target.fit(centres.repeat(40, 1) + 0.01 * torch.randn(120, 16, generator=torch.Generator().manual_seed(0)))
    order = target.centres.mean(1).argsort()
    batch = {"image": torch.zeros(1, 1, 8, 12)}
    batch["image"][:, :, :4, :4] = 0.98
    batch["image"][:, :, 4:, 8:] = 0.45
    assert target(batch, layout).tolist() == [[order[2], order[0], order[0], order[0], order[0], order[1]]]
    assert (target.paint(order[None]) - centres).abs().max() < 0.02


def test_the_same_patches_and_seed_give_the_same_centres():
    patches = torch.rand(300, 16, generator=torch.Generator().manual_seed(0))
    a, b = made(KMeansPatches(8)), made(KMeansPatches(8))
    a.fit(patches)
    b.fit(patches)
    assert torch.equal(a.centres, b.centres)


# ---- DALL-E's encoder
def save(path, hidden=8, codes=16):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net = DvaeEncoder(hidden, codes)
    save_file(net.state_dict(), str(path))
    return net.eval()


def test_the_tokenizer_sees_a_second_view_of_stride_8_mapped_into_its_range(tmp_path):
    net = save(tmp_path / "dvae.safetensors")
    target, layout = made(DalleTokenizer(str(tmp_path / "dvae.safetensors"))), layout_of((2, 3), (8, 8))
    batch = image(16, 24)
    assert target.size(Spec()) == 16
    assert target.init_args["codes"] == 16
    found = target(batch, layout)
    assert found.shape == (2, 6)
    assert torch.equal(found, net(0.8 * batch["image"] + 0.1).argmax(1).flatten(1))  # 16x24 is its own second view
    assert not list(target.parameters())
    assert not target.state_dict()
    assert target(image(64, 96), layout).shape == (2, 6)  # any size of crop, resized
    assert target(image(16, 24, channels=1), layout).shape == (2, 6)


def test_its_published_size_is_53_8_million_parameters():
    with torch.device("meta"):
        net = DvaeEncoder()
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(53.8, abs=0.1)  # [M] a file of 215 MB


def test_a_view_with_another_grid_is_refused(tmp_path):
    save(tmp_path / "dvae.safetensors")
    target = made(DalleTokenizer(str(tmp_path / "dvae.safetensors"), size=112))
    with pytest.raises(ConfigError, match="tokenizer grid 14x14 differs from patch grid 16x16"):
        target(image(64, 64), layout_of((16, 16)))


def test_a_missing_or_foreign_file_is_named_with_the_command(tmp_path):
    with pytest.raises(ConfigError, match=r"no file .*none.safetensors; make it once with: quire cae-tokenizer"):
        DalleTokenizer(str(tmp_path / "none.safetensors")).size(Spec())
    (tmp_path / "broken.safetensors").write_bytes(b"not one")
    with pytest.raises(ConfigError, match="is no safetensors file, or is truncated"):
        DalleTokenizer(str(tmp_path / "broken.safetensors")).size(Spec())
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ConfigError, match="doesn't hold a discrete VAE encoder; make it with: quire cae-tokenizer"):
        DalleTokenizer(str(tmp_path / "other.safetensors")).size(Spec())


# ---- the pickle
def foreign(tmp_path, hidden=4, codes=8):
    """A pickled module of a package that isn't installed, with DALL-E's names of weights."""
    torch.manual_seed(0)
    net = DvaeEncoder(hidden, codes)
    package = types.ModuleType("dall_e")

    class Encoder(torch.nn.Module):
        pass

    class Conv2d(torch.nn.Module):
        pass

    for cls in (Encoder, Conv2d):
        cls.__module__, cls.__qualname__ = "dall_e", cls.__name__
        setattr(package, cls.__name__, cls)
    sys.modules["dall_e"] = package

    def copy(module):
        if isinstance(module, torch.nn.Conv2d):
            made = Conv2d()
            made.w, made.b = torch.nn.Parameter(module.weight.detach()), torch.nn.Parameter(module.bias.detach())
            return made
        made = Encoder()
        for name, child in module.named_children():
            made.add_module(name, copy(child))
        return made

    try:
        torch.save(copy(net), tmp_path / "encoder.pkl")
    finally:
        del sys.modules["dall_e"]
    return net


def test_conversion_reads_the_numbers_of_a_module_whose_package_is_missing(tmp_path, capsys):
    net = foreign(tmp_path)
    assert main([str(tmp_path / "encoder.pkl"), str(tmp_path / "dvae.safetensors")]) == 0
    assert "8 codes" in capsys.readouterr().out
    read = DalleTokenizer(str(tmp_path / "dvae.safetensors")).read()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in read.state_dict().items())


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_conversion_runs_no_code_of_the_pickle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(2), "evil": Evil()}, "evil.pkl")
    assert torch.equal(weights(tmp_path / "evil.pkl")["w"], torch.ones(2))
    assert not (tmp_path / "ran").exists()


def test_conversion_names_what_it_can_t_read(tmp_path):
    with pytest.raises(ConfigError, match="there is no file"):
        convert(tmp_path / "no.pkl", tmp_path / "x")
    (tmp_path / "bad.pkl").write_bytes(b"bad")
    with pytest.raises(ConfigError, match="is no file that torch.save wrote, or is truncated"):
        convert(tmp_path / "bad.pkl", tmp_path / "x")
    torch.save({"w": torch.ones(1)}, tmp_path / "other.pkl")
    with pytest.raises(ConfigError, match="doesn't hold the encoder of a discrete VAE"):
        convert(tmp_path / "other.pkl", tmp_path / "x")
    torch.save([1, 2], tmp_path / "list.pkl")
    with pytest.raises(ConfigError, match="holds no module with weights"):
        convert(tmp_path / "list.pkl", tmp_path / "x")


# ---- CLIP
def test_clip_features_fall_on_the_patches(tmp_path):
    pytest.importorskip("transformers")
    path = ClipTarget.tiny()["model"]["objective"]["init_args"]["target"]["init_args"]["path"]
    target, layout = made(ClipTarget(path)), layout_of((2, 3), (8, 8))
    assert target.size(Spec()) == 8
    found = target(image(16, 24), layout)
    assert found.shape == (2, 6, 8)
    assert found.mean(-1).abs().max() < 1e-4  # normalised last
    assert not target.state_dict()
    with pytest.raises(ConfigError, match="there is no config.json in"):
        ClipTarget(str(tmp_path)).size(Spec())
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="holds a bert model, not CLIP's image encoder"):
        ClipTarget(str(tmp_path)).size(Spec())


# ---- a tokenizer of our own
def trained(tmp_path, patch=4, codes=8):
    torch.manual_seed(0)
    encoder, decoder = PatchTokenizer(patch, codes, 4, 16), PatchTokenDecoder(16)
    model = Model(encoder=encoder, decoder=decoder, objective=Reconstruction(), spec={"image_size": 8, "channels": 1})
    model.configure_model()
    return model, str(export(model, tmp_path / "tokenizer"))


def test_latents_are_rows_of_the_codebook_and_gradients_pass_straight_through(tmp_path):
    model, _ = trained(tmp_path)
    batch = image(8, 8, 1)
    codes = model.encoder(batch)
    book = torch.nn.functional.normalize(model.encoder.book, dim=-1)
    assert torch.allclose(codes.latents, book[codes.ids], atol=1e-6)
    assert (codes.grid, codes.vocab) == ((2, 2), 8)
    losses = model.objective(model, batch)
    assert set(losses) == {"reconstruct", "bottleneck"}
    losses["reconstruct"].backward()
    assert model.encoder.net[0].weight.grad.abs().sum() > 0
    assert model.encoder.book.grad is None  # the codes move by their own pull alone


def test_a_trained_tokenizer_s_ids_are_targets_and_it_stays_frozen(tmp_path):
    model, path = trained(tmp_path)
    target = made(TokenizerIds(Pretrained(path)))
    batch = image(8, 8, 1)
    assert target.size(Spec()) == 8
    assert torch.equal(target(batch, layout_of((2, 2))), model.encoder(batch).ids)
    assert not any(p.requires_grad for p in target.parameters())
    assert not target.train().tokenizer.training


def test_a_tokenizer_that_was_never_trained_or_has_no_ids_or_another_grid_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="TokenizerIds.tokenizer was never trained: give {class_path: Pretrained"):
        made(TokenizerIds(PatchTokenizer()))
    _, path = trained(tmp_path)
    with pytest.raises(ConfigError, match="tokenizer grid 2x2 differs from patch grid 4x4"):
        made(TokenizerIds(Pretrained(path)))(image(8, 8, 1), layout_of((4, 4), (2, 2)))
    from quire.roles.tokens.vit import ViTEncoder

    encoder = ViTEncoder(4, 16, 1, 2)
    encoder.refer("origin", {})
    build(encoder, Spec({"image_size": [8, 8], "channels": 1}))
    with pytest.raises(ConfigError, match="TokenizerIds.tokenizer is ViTEncoder, whose codes are no ids"):
        made(TokenizerIds(encoder)).size(Spec())
    with pytest.raises(ConfigError, match="codes >= 2"):
        PatchTokenizer(codes=1)
