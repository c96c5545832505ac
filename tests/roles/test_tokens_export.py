"""Our vision transformers written for timm: its own classes load them strictly and give the same features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import quire
from quire.__main__ import execute
from quire.contracts import Spec, build
from quire.errors import ConfigError, DataError
from quire.model import Model
from quire.roles.tokens.frames import FrameEncoder
from quire.roles.tokens.timm import TimmViT
from quire.roles.tokens.vit import ViTEncoder

SPEC = Spec(image_size=[16, 24], channels=3)
SMALL = {"patch": 8, "width": 16, "depth": 2, "heads": 2}


def made(cls: Any = ViTEncoder, **given: Any) -> Any:
    torch.manual_seed(0)
    encoder = cls(**(given if cls is TimmViT else {**SMALL, **given}))
    build(encoder, SPEC)
    for p in encoder.parameters():  # biases and factors that start at a constant too
        torch.nn.init.normal_(p, std=0.1)
    return encoder.eval()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"class_token": True},
        {"class_token": True, "positions": "learned"},
        {"positions": "none"},
        {"class_token": True, "key_bias": False, "layer_scale": 0.1},
        {"final_norm": False, "mlp_ratio": 2.0},
        {"patch": [8, 4], "class_token": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_timm_loads_it_strictly_and_gives_the_same_features(given: dict[str, Any]) -> None:
    encoder = made(**given)
    weights = encoder.to_timm()
    vit = timm.models.VisionTransformer(**weights.arguments).eval()
    vit.load_state_dict(weights.state, strict=True)
    image = torch.rand(2, 3, 16, 24)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (weights.mean, weights.std))
    want = encoder({"image": image}).joined()
    torch.testing.assert_close(vit.forward_features((image - mean) / std), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "positions", "more"),
    [
        ("vit_tiny_patch16_224", "keep", {}),
        ("vit_tiny_patch16_224", "none", {}),
        ("vit_tiny_patch16_224", "learned", {}),
        ("vit_tiny_patch16_224", "sincos", {"reg_tokens": 3}),
        ("deit3_small_patch16_224", "sincos", {}),  # its own table has no row for the class token
        ("vit_small_patch16_dinov3", "keep", {}),
        ("eva02_tiny_patch14_224", "keep", {}),
    ],
)
@torch.no_grad()
def test_a_timm_model_goes_back_to_timm(name: str, positions: str, more: dict[str, Any]) -> None:
    options = {"patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 2, **more}
    encoder = made(TimmViT, model=name, positions=positions, options=options)
    weights = encoder.to_timm()
    assert weights.call == "timm.create_model"
    vit: Any = timm.create_model(**weights.arguments).eval()
    vit.load_state_dict(weights.state, strict=True)
    image = torch.rand(2, 3, 16, 24)
    want = encoder({"image": image}).joined()
    torch.testing.assert_close(vit.forward_features(encoder.normalise(image)), want, atol=1e-5, rtol=0)


@torch.no_grad()
def test_round_trip_by_command_and_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    encoder = made(class_token=True)
    quire.export(Model(encoder=encoder, spec=SPEC), tmp_path / "run")
    file = tmp_path / "out" / "vit.safetensors"
    assert execute(["export", str(tmp_path / "run"), "--to", "timm", "-o", str(file)]) == 0
    said = capsys.readouterr().out
    assert (
        "timm.models.VisionTransformer(img_size=(16, 24), patch_size=(8, 8)" in said and "mean [0.5, 0.5, 0.5]" in said
    )
    with safe_open(file, "pt") as held:
        about = held.metadata()
    vit = timm.models.VisionTransformer(**json.loads(about["arguments"])).eval()
    vit.load_state_dict(load_file(file), strict=True)
    image = torch.rand(2, 3, 16, 24)
    want = encoder({"image": image}).joined()
    torch.testing.assert_close(vit.forward_features((image - 0.5) / 0.5), want, atol=1e-5, rtol=0)
    # the file, given to a TimmViT of these sizes
    options = {"patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2}
    again = TimmViT("vit_tiny_patch16_224", pretrained=str(file), options=options)
    build(again, SPEC)
    torch.testing.assert_close(again.eval()({"image": image}).joined(), want, atol=1e-5, rtol=0)


@torch.no_grad()
def test_weights_by_file_are_kept_in_checkpoints_and_the_file_may_go(tmp_path: Path) -> None:
    file = tmp_path / "vit.pth"
    options = {"patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 2}
    first = made(TimmViT, model="vit_tiny_patch16_224", options=options)
    torch.save({"model": {**first.vit.state_dict(), "head.weight": torch.zeros(5, 48)}}, file)  # a head is no fault
    encoder = TimmViT("vit_tiny_patch16_224", pretrained=str(file), options=options)
    model = Model(encoder=encoder, spec=SPEC)
    model.configure_model()
    folder = quire.export(model, tmp_path / "run")
    file.unlink()
    image = {"image": torch.rand(2, 3, 16, 24)}
    assert torch.equal(quire.load(folder).encoder(image).values, first(image).values)


def test_wrong_files_and_encoders_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = {"patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 2}

    def load(file: Path, **more: Any) -> None:
        build(TimmViT("vit_tiny_patch16_224", pretrained=str(file), options={**options, **more}), SPEC)

    with pytest.raises(ConfigError, match="there is no file .*nowhere.pth"):
        load(tmp_path / "nowhere.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="broken.safetensors holds no weights that can be read"):
        load(tmp_path / "broken.safetensors")
    file, state = tmp_path / "vit.pth", made(TimmViT, model="vit_tiny_patch16_224", options=options).vit.state_dict()
    torch.save(state, file)
    with pytest.raises(DataError, match="vit.pth doesn't fit vit_tiny_patch16_224: it lacks blocks.2.norm1.weight"):
        load(file, depth=3)
    with pytest.raises(DataError, match="vit.pth doesn't fit vit_tiny_patch16_224: .* embed_dim"):
        load(file, embed_dim=32)
    torch.save({**state, "pos_embed": torch.zeros(1, 17, 48)}, file)
    with pytest.raises(ConfigError, match="has positions for 16 patches, the data has 6: set positions: resample"):
        load(file)
    frames = Model(encoder=FrameEncoder(width=16, depth=1, heads=2), spec=Spec(frames=8, bands=4))
    frames.configure_model()
    quire.export(frames, tmp_path / "frames")
    quire.export(Model(encoder=made(), spec=SPEC), tmp_path / "run")
    for argv, said in (
        (["nowhere"], "no checkpoint at nowhere"),
        ([str(tmp_path / "frames"), "--to", "timm"], "FrameEncoder can't be written for timm"),
        ([str(tmp_path / "run"), "--to", "timm", "--part", "decoder"], "has no part 'decoder'"),
        ([str(tmp_path / "run"), "--to", "keras"], "invalid choice"),
        ([str(tmp_path / "run"), "--to", "timm", "-o", str(tmp_path / "x.pth")], "must end in .safetensors"),
    ):
        assert execute(["export", *argv, *([] if "-o" in argv else ["-o", str(tmp_path / "x.safetensors")])]) != 0
        assert said in capsys.readouterr().err


def test_quire_s_own_format_by_command(tmp_path: Path) -> None:
    encoder = made()
    quire.export(Model(encoder=encoder, spec=SPEC), tmp_path / "run")
    assert execute(["export", str(tmp_path / "run"), "--to", "quire", "-o", str(tmp_path / "again")]) == 0
    image = {"image": torch.rand(1, 3, 16, 24)}
    assert torch.equal(quire.load(tmp_path / "again").encoder(image).values, encoder(image).values)
