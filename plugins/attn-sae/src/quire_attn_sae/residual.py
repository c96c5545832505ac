"""Values as linear functions of the residual stream, the norm before them held at its scale (arXiv 2406.17759).

Which map makes the values and which norm stands before it is found in the block, and checked on the batch itself: what
is found must give the values that were read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quire.contracts import Batch
from quire.errors import ConfigError
from quire.roles.sites.anatomy import attention_of, is_map
from quire.roles.sites.subject import Subject

BIAS, OTHER = "bias", "other"
"""Parts that are no component: biases of norm and map; what components leave over."""


@dataclass
class ValueMap:
    """v = weight · (gain ∘ x~ + shift) + bias, where x~ is x, centred or not, over its scale.

    Attributes:
        weight: [H_kv,d_h,D].
        bias: [H_kv,d_h].
        gain: [D] of the norm.
        shift: [D] of the norm, 0 for RMS norms.
        centred: Whether the norm takes the mean off.
        eps: Of the norm.
    """

    weight: Tensor
    bias: Tensor
    gain: Tensor
    shift: Tensor
    centred: bool
    eps: float

    def scale(self, x: Tensor) -> Tensor:
        """[...,1] that the norm divides x by."""
        x = self._centre(x)
        return (x.square().mean(-1, keepdim=True) + self.eps).sqrt()

    def parts(self, component: Tensor, scale: Tensor) -> Tensor:
        """[B,S,H_kv,d_h] that a component [B,S,D] of x adds to the values."""
        return torch.einsum("bsd,hed->bshe", self.gain * self._centre(component) / scale, self.weight)

    def constant(self) -> Tensor:
        """[H_kv,d_h] that the biases add."""
        return self.weight @ self.shift + self.bias

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x


def value_map(subject: Subject, block: int, heads: int, kept: int, head_width: int) -> ValueMap:
    """The map of one block.

    Args:
        subject: The frozen model.
        block: Number of the block.
        heads: H, of queries.
        kept: H_kv, of values.
        head_width: d_h.

    Raises:
        ConfigError: no such map or norm, with the modules tried.
    """
    module = subject.sites.anatomy.blocks[block]
    attention = attention_of(module)
    norm = next((m for m in module.modules() if "norm" in type(m).__name__.lower() and _gain(m) is not None), None)
    found = None if attention is None else _values(attention, heads, kept, head_width)
    if found is None or norm is None:
        tried = [] if attention is None else [n for n, _ in attention.named_children()]
        what = "a map that makes the values" if found is None else "a norm before the attention"
        raise ConfigError(
            f"recursive: block {block} of subject {subject.name} has no module known as {what}; tried"
            f" {', '.join(tried) or 'none'}: set recursive: false"
        )
    weight, bias = found
    gain = _gain(norm)
    assert gain is not None
    shift = getattr(norm, "bias", None)
    eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None) or 1e-6
    centred = "rms" not in type(norm).__name__.lower() and isinstance(norm, nn.LayerNorm)
    return ValueMap(
        weight.detach().unflatten(0, (kept, head_width)),
        (weight.new_zeros(len(weight)) if bias is None else bias.detach()).unflatten(0, (kept, head_width)),
        gain,
        torch.zeros_like(gain) if shift is None else shift.detach(),
        centred,
        float(eps),
    )


def _gain(norm: nn.Module) -> Tensor | None:
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1:
        return None
    return 1 + weight.detach() if "gemma" in type(norm).__name__.lower() else weight.detach()


def _values(attention: nn.Module, heads: int, kept: int, width: int) -> tuple[Tensor, Any] | None:
    """(weight [H_kv*d_h,D], bias) from a map of the values alone, of keys and values, or of all three."""
    size = kept * width
    maps = {n.rpartition(".")[2]: m for n, m in attention.named_modules() if is_map(m)}
    for name in ("v_proj", "value", "v", "wv"):
        if name in maps:
            weight, bias = _rows(maps[name])
            return (weight, bias) if len(weight) == size else None
    for name in ("key_value", "kv", "c_attn", "qkv", "qkv_proj", "Wqkv"):
        if name in maps:
            weight, bias = _rows(maps[name])
            return weight[-size:], None if bias is None else bias[-size:]
    if "query_key_value" in maps:  # GPT-NeoX and Bloom: query, key and value of a head side by side
        weight, bias = _rows(maps["query_key_value"])
        if len(weight) == 3 * heads * width:
            apart = weight.unflatten(0, (heads, 3, width))[:, 2].flatten(0, 1)
            return apart, None if bias is None else bias.unflatten(0, (heads, 3, width))[:, 2].flatten()
    return None


def _rows(module: nn.Module) -> tuple[Tensor, Any]:
    weight: Any = module.weight
    return (weight.T if type(module).__name__ == "Conv1D" else weight), getattr(module, "bias", None)


@torch.no_grad()
def components(subject: Subject, block: int, batch: Batch, dictionary: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The residual stream that a block reads and what it is the sum of.

    Args:
        subject: The frozen model.
        block: Number of the block.
        batch: What the subject reads.
        dictionary: A Quire model of a dictionary trained on this residual stream; None splits by what wrote to it.

    Returns:
        x [B,S,D], and [B,S,D] by name, which sum to x: ``embed``, each earlier block's ``blocks.i.attn_out`` and
        ``blocks.i.mlp_out``, and ``other``; or the largest latents, ``latents``, ``b_dec`` and ``error``.
    """
    site = f"blocks.{block}.resid_pre"
    if dictionary is not None:
        x = subject.sites.read(batch, [site]).values[site].float()
        return x, _latents(x, dictionary, batch)
    below = [n for n in subject.sites.names() if n.endswith(("attn_out", "mlp_out")) and int(n.split(".")[1]) < block]
    found = subject.sites.read(batch, list(dict.fromkeys([site, "blocks.0.resid_pre", *below]))).values
    x = found[site].float()
    parts = {"embed": found["blocks.0.resid_pre"].float(), **{n: found[n].float() for n in below}}
    rest = x - torch.stack(list(parts.values())).sum(0)
    if float(rest.abs().max()) > 1e-4 * float(x.abs().max()):  # norms behind the parts, parallel paths
        parts[OTHER] = rest
    return x, parts


def _latents(x: Tensor, dictionary: Any, batch: Batch, most: int = 16) -> dict[str, Tensor]:
    encoder, decoder = dictionary.encoder, dictionary.decoder
    if getattr(encoder, "norm", "none") != "none":
        raise ConfigError("recursive: the residual dictionary normalises its input: train one with norm: none")
    if x.shape[-1] != encoder.width:
        raise ConfigError(f"recursive: the residual stream has width {x.shape[-1]}, the dictionary {encoder.width}")
    codes = encoder.encode(x).dense().to(x.dtype)  # [B,S,F]
    rows = decoder.W_dec.detach()
    largest = codes.flatten(0, 1).amax(0).topk(min(most, codes.shape[-1])).indices.tolist()
    parts = {f"latent {i}": codes[..., i, None] * rows[i] for i in largest if bool((codes[..., i] > 0).any())}
    others = codes.clone()
    others[..., largest] = 0
    parts["latents"] = others @ rows
    bias = x.new_zeros(x.shape[-1]) if decoder.b_dec is None else decoder.b_dec.detach()
    parts["b_dec"] = bias.expand_as(x)
    parts["error"] = x - codes @ rows - bias
    return parts


@torch.no_grad()
def value_parts(
    subject: Subject, block: int, batch: Batch, value: Tensor, heads: int, dictionary: Any = None
) -> dict[str, Tensor]:
    """Values [B,S,H_kv,d_h] as parts by component, with ``bias``; they sum to ``value``.

    Raises:
        ConfigError: the block's values are no linear map of its normalised residual stream.
    """
    made = value_map(subject, block, heads, *value.shape[2:])
    x, found = components(subject, block, batch, dictionary)
    scale = made.scale(x)
    parts = {name: made.parts(component, scale) for name, component in found.items()}
    parts[BIAS] = made.constant().expand_as(value)
    total = torch.stack(list(parts.values())).sum(0)
    mask = batch.get("mask")
    gap = (total - value).abs() if mask is None else (total - value).abs()[mask]
    if float(gap.max()) > 1e-3 * max(1.0, float(value.abs().max())):
        raise ConfigError(
            f"recursive: values of block {block} of subject {subject.name} are not W_V times its first norm of the"
            f" residual stream (they differ by {float(gap.max()):.2g}): set recursive: false"
        )
    return parts
