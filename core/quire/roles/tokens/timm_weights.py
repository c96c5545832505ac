"""Vision transformers as weights that timm loads, and such files read back."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.errors import ConfigError, DataError
from quire.roles.tokens.contract import Segment
from quire.roles.tokens.trunk import TrunkEncoder

UNUSED = ("head", "fc_norm.", "attn_pool.", "mask_token")
"""Starts of the names that timm models have and features don't need."""


@dataclass(frozen=True)
class TimmWeights:
    """What timm needs to give the same features.

    Args:
        state: A state dict, complete.
        call: What makes the model: ``timm.models.VisionTransformer`` or ``timm.create_model``.
        arguments: Its arguments, plain values.
        mean: What is subtracted from an image in [0,1], a number a channel.
        std: What it is divided by after that.
    """

    state: dict[str, Tensor]
    call: str
    arguments: dict[str, Any]
    mean: list[float]
    std: list[float]

    def __str__(self) -> str:
        given = ", ".join(f"{k}={tuple(v) if isinstance(v, list) else v!r}" for k, v in self.arguments.items())
        return f"{self.call}({given}); images in [0,1] are normalised by mean {self.mean} and std {self.std}"

    def write(self, file: Path) -> None:
        """As safetensors; call, arguments, mean and std in its header. Raises ``ConfigError`` for another suffix."""
        from safetensors.torch import save_file

        if file.suffix != ".safetensors":
            raise ConfigError(f"the file for timm is {file}; it must end in .safetensors")
        file.parent.mkdir(parents=True, exist_ok=True)
        about = {"arguments": self.arguments, "mean": self.mean, "std": self.std}
        header = {"format": "pt", "call": self.call, **{k: json.dumps(v) for k, v in about.items()}}
        save_file(self.state, str(file), header)


@torch.no_grad()
def trunk_weights(
    encoder: TrunkEncoder, proj: Any, segment: Segment, channels: int, mean: list[float], std: list[float]
) -> TimmWeights:
    """A trunk and one patch embedding as a timm ``VisionTransformer`` without a head.

    Prefix tokens become the class token and registers; they get rows of zeros in the table of positions.

    Args:
        encoder: Built.
        proj: The linear map of patches, values channel first.
        segment: The cells it embeds.
        channels: Of the picture.
        mean: What is subtracted before ``proj``, a number a channel.
        std: What it is divided by after that.
    """
    patch, prefix, width = (segment.patch[0], segment.patch[1]), encoder.prefix_tokens, encoder.width
    state = {
        "patch_embed.proj.weight": proj.weight.reshape(width, channels, *patch),
        "patch_embed.proj.bias": proj.bias,
    }
    if prefix:
        tokens = torch.cat([p.reshape(-1, width) for p in encoder.prefix])[None]
        state |= {"cls_token": tokens[:, :1]} | ({"reg_token": tokens[:, 1:]} if prefix > 1 else {})
    if encoder.places is not None:
        rows = encoder.places(encoder.built_layout)[segment.start : segment.stop]
        state["pos_embed"] = torch.cat([rows.new_zeros(prefix, width), rows])[None]
    for name, value in encoder.blocks.state_dict().items():
        if not name.endswith(("q_bias", "v_bias")):  # keys without a bias have one of zeros there
            state[f"blocks.{name}"] = value
    for i, block in enumerate(encoder.blocks):
        state[f"blocks.{i}.attn.qkv.bias"] = block.attn.qkv.bias  # type: ignore[union-attr]
    state |= {f"norm.{k}": v for k, v in encoder.norm.state_dict().items()}
    arguments = {
        "img_size": [segment.grid[0] * patch[0], segment.grid[1] * patch[1]],
        "patch_size": list(patch),
        "in_chans": channels,
        "num_classes": 0,
        "global_pool": "token" if prefix else "avg",
        "embed_dim": width,
        "depth": encoder.depth,
        "num_heads": encoder.heads,
        "mlp_ratio": encoder.mlp_ratio,
        "init_values": encoder.layer_scale,
        "class_token": prefix > 0,
        "reg_tokens": max(0, prefix - 1),
        "pos_embed": "none" if encoder.places is None else "learn",
        "final_norm": encoder.final_norm,
        "fc_norm": False,
    }
    return TimmWeights(_copied(state), "timm.models.VisionTransformer", arguments, mean, std)


@torch.no_grad()
def model_weights(
    vit: Any, arguments: dict[str, Any], rows: Tensor | None, bare: bool, mean: list[float], std: list[float]
) -> TimmWeights:
    """A model of timm's as its own state dict.

    Args:
        vit: The model, without a head.
        arguments: Of ``timm.create_model``, plain values.
        rows: [N,D] of a table of positions that isn't timm's; None where there is none.
        bare: Whether it has lost timm's table of positions.
        mean: What is subtracted from an image, a number a channel.
        std: What it is divided by after that.
    """
    state, given = dict(vit.state_dict()), dict(arguments)
    if rows is not None:
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        state["pos_embed"] = torch.cat([rows.new_zeros(prefix, rows.shape[1]), rows])[None]
    elif bare:
        given["pos_embed"] = "none"
    return TimmWeights(_copied(state), "timm.create_model", given, mean, std)


def _copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().cpu().clone().contiguous() for k, v in state.items()}


@torch.no_grad()
def load_file(vit: Any, file: Path, model: str, resample: bool) -> None:
    """Load a file of weights into a model of timm's; nothing in it is run.

    Args:
        vit: The model.
        file: safetensors, or what ``torch.save`` wrote; layouts that timm converts by itself are converted.
        model: The model's name, for messages.
        resample: Whether a table of positions for another grid is resized.

    Raises:
        ConfigError: no such file, or positions for another grid.
        DataError: a file that can't be read, or that doesn't fit.
    """
    from timm.models import load_state_dict

    if not file.is_file():
        raise ConfigError(f"TimmViT.pretrained: there is no file {file}")
    try:
        raw = load_state_dict(str(file))
    except Exception as error:  # a broken file raises whatever its reader does
        raise DataError(f"{file} holds no weights that can be read ({str(error).splitlines()[0]})") from error
    table, own = raw.get("pos_embed"), getattr(vit, "pos_embed", None)
    if table is not None and own is not None and table.shape[1] != own.shape[1] and not resample:
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        raise ConfigError(
            f"{file} has positions for {table.shape[1] - prefix} patches, the data has {own.shape[1] - prefix}: "
            "set positions: resample"
        )
    try:
        state = sys.modules[type(vit).__module__].checkpoint_filter_fn(raw, vit)
        if table is not None and own is not None and table.shape == own.shape:
            state["pos_embed"] = table  # it fits: nothing to guess about the grid it was made for
        missing, _ = vit.load_state_dict(state, strict=False)
    except (RuntimeError, ValueError, KeyError) as error:
        raise DataError(
            f"{file} doesn't fit {model}: {str(error).splitlines()[-1].strip()}; give embed_dim, depth and the like in "
            "options"
        ) from error
    missing = [n for n in missing if not n.startswith(UNUSED)]
    if missing:
        raise DataError(f"{file} doesn't fit {model}: it lacks {missing[0]}" + _more(len(missing)))


def _more(count: int) -> str:
    return f" and {count - 1} more weights" if count > 1 else ""
