"""One modality of a MultiModalViT as a timm ViT's weights, and the way back. After Bachmann et al. 2022."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.errors import ConfigError
from quire_multimae.adapters import PatchAdapter
from quire_multimae.encoder import MultiModalViT


def to_timm(encoder: MultiModalViT, modality: str = "image") -> dict[str, Tensor]:
    """Weights for timm's ``VisionTransformer`` with a class token, from one modality's adapter and the trunk.

    The first global token becomes the class token, the sin-cos table the position table (zeros for the class token).
    The adapter's mean and std aren't part of it: feed the timm model what the adapter would have normalised.

    Args:
        encoder: Built, with exactly one global token.
        modality: A modality with a PatchAdapter.

    Returns:
        A state dict; ``norm`` is there only where the encoder has a final norm (else make timm's ``final_norm=False``).

    Raises:
        ConfigError: an unknown modality, one of classes, or another number of global tokens.
    """
    adapter = _adapter(encoder, modality)
    segment = next(s for s in encoder.built_layout.segments if s.name == modality)
    weight = adapter.proj.weight.reshape(-1, int(adapter.channels or 0), *adapter.patch)
    cells = torch.zeros(segment.cells, encoder.width)
    if encoder.places is not None:
        cells = encoder.places(encoder.built_layout)[segment.start : segment.stop]
    made = {
        "cls_token": encoder.prefix[0].reshape(1, 1, -1),
        "pos_embed": torch.cat([torch.zeros_like(cells[:1]), cells])[None],
        "patch_embed.proj.weight": weight,
        "patch_embed.proj.bias": adapter.proj.bias,
    }
    made |= {f"blocks.{k}": v for k, v in encoder.blocks.state_dict().items()}
    made |= {f"norm.{k}": v for k, v in encoder.norm.state_dict().items()}
    return {k: v.detach().clone() for k, v in made.items()}


@torch.no_grad()
def from_timm(encoder: MultiModalViT, state: dict[str, Tensor], modality: str = "image") -> None:
    """Load a timm ``VisionTransformer``'s trunk and patch embedding; other modalities' adapters stay as they are.

    The class token becomes the first global token (with its position's row added). A learned position table replaces
    nothing: this encoder's positions are fixed, so its mean row goes into the adapter's bias.

    Args:
        encoder: Built, with exactly one global token, of the same width, depth and heads.
        state: timm's state dict; ``head`` and ``fc_norm`` are ignored.
        modality: The modality that gets the patch embedding.

    Raises:
        ConfigError: a modality or shape that doesn't fit, or keys that are missing.
    """
    adapter = _adapter(encoder, modality)
    try:
        weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
        positions = state["pos_embed"][0]
        token = state["cls_token"].reshape(-1)
    except KeyError as error:
        raise ConfigError(f"the timm weights lack {error}: a plain ViT with a class token is needed") from error
    if weight.flatten(1).shape != adapter.proj.weight.shape:
        raise ConfigError(
            f"timm's patch embedding is {list(weight.shape)}, {modality} needs {list(adapter.proj.weight.shape)}"
        )
    segment = next(s for s in encoder.built_layout.segments if s.name == modality)
    cells = positions[1:]
    if encoder.places is not None:
        ours = encoder.places(encoder.built_layout)[segment.start : segment.stop].to(cells)
        shift = (cells - ours).mean(0) if cells.shape == ours.shape else cells.mean(0) - ours.mean(0)
    else:
        shift = cells.mean(0)
    blocks = {k.removeprefix("blocks."): v for k, v in state.items() if k.startswith("blocks.")}
    norm = {k.removeprefix("norm."): v for k, v in state.items() if k.startswith("norm.")}
    try:
        encoder.blocks.load_state_dict(blocks)
        if encoder.final_norm:
            encoder.norm.load_state_dict(norm)
    except RuntimeError as error:
        raise ConfigError(f"the timm trunk doesn't fit this encoder: {str(error).splitlines()[-1].strip()}") from error
    adapter.proj.weight.copy_(weight.flatten(1))
    adapter.proj.bias.copy_(bias + shift)
    encoder.prefix[0].copy_(token + positions[0])


def _adapter(encoder: MultiModalViT, modality: str) -> Any:
    adapter = encoder.adapters.get(modality)
    if not isinstance(adapter, PatchAdapter):
        have = ", ".join(n for n, a in encoder.adapters.items() if isinstance(a, PatchAdapter)) or "none"
        raise ConfigError(f"{modality!r} is no modality with a PatchAdapter; there are: {have}")
    if encoder.prefix_tokens != 1:
        raise ConfigError(f"a timm ViT has one class token, the encoder has global_tokens={encoder.prefix_tokens}")
    return adapter
