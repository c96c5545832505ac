"""A timm ViT's weights for one modality of a MultiModalViT; ``to_timm`` goes back. After Bachmann et al. 2022."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.errors import ConfigError
from quire_multimae.encoder import MultiModalViT


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
    adapter = encoder.patch_adapter(modality)
    if encoder.prefix_tokens != 1:
        raise ConfigError(f"a timm ViT has one class token, the encoder has global_tokens={encoder.prefix_tokens}")
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
