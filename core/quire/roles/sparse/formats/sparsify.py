"""sparsify: ``cfg.json`` and ``sae.safetensors``; encoder.weight and W_dec are both [F,D]."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from quire.errors import ConfigError
from quire.roles.sparse.formats.weights import Weights, as_rows, read_json, read_safetensors, take

NAME = "sparsify"
FILES = ("cfg.json", "sae.safetensors")


def read(folder: Path) -> Weights:
    """A folder of it; ``num_latents: 0`` means expansion_factor times d_in. Raises ``ConfigError``."""
    cfg, tensors = read_json(folder / FILES[0]), read_safetensors(folder / FILES[1])
    if cfg.get("activation", "topk") != "topk":
        raise ConfigError(f"{folder}: activation {cfg['activation']!r}; Quire reads topk")
    if cfg.get("skip_connection") or "W_skip" in tensors:
        raise ConfigError(f"{folder} has a skip connection, which SparseDecoder has not: it can't be read whole")
    if "d_in" not in cfg:
        raise ConfigError(f"{folder / FILES[0]} has no 'd_in'")
    width = int(cfg["d_in"])
    latents = int(cfg.get("num_latents") or cfg.get("expansion_factor", 32) * width)
    W_enc = take(tensors, "encoder.weight", folder)
    W_dec = take(tensors, "W_dec", folder)
    return Weights(
        W_enc=as_rows(W_enc, latents, width, "encoder.weight", folder),
        W_dec=as_rows(W_dec, latents, width, "W_dec", folder),
        b_enc=tensors.get("encoder.bias"),
        b_dec=tensors.get("b_dec"),
        selector="topk",
        k=int(cfg.get("k", 32)),
        subtract_bias=not cfg.get("transcode", False),
        transcoder=bool(cfg.get("transcode", False)),
        metadata={k: v for k, v in cfg.items() if isinstance(v, (str, int, float, bool))},
    ).check(folder)


def write(weights: Weights, folder: Path) -> None:
    """Write a folder. Raises ``ConfigError`` for anything but TopK on activations as they are."""
    latents, width = weights.W_enc.shape
    if weights.selector != "topk" or weights.norm != "none":
        what = weights.selector if weights.selector != "topk" else f"norm: {weights.norm}"
        raise ConfigError(f"the sparsify format has no {what}: use saelens, or a Quire checkpoint")
    if weights.W_dec.shape[1] != width:
        raise ConfigError("the sparsify format needs a target as wide as the input: use saelens")
    if not weights.transcoder and not weights.subtract_bias:
        raise ConfigError("sparsify's autoencoders subtract b_dec; this encoder does not: use saelens")
    zeros = weights.W_enc.new_zeros
    unit = bool(((weights.W_dec.norm(dim=1) - 1).abs() < 1e-3).all())
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, latents // width),
        "normalize_decoder": unit,
        "num_latents": latents,
        "k": weights.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": weights.transcoder,
        "d_in": width,
    }
    tensors = {
        "encoder.weight": weights.W_enc.contiguous(),
        "encoder.bias": zeros(latents) if weights.b_enc is None else weights.b_enc,
        "W_dec": weights.W_dec.contiguous(),
        "b_dec": zeros(width) if weights.b_dec is None else weights.b_dec,
    }
    save_file(tensors, folder / FILES[1])
    (folder / FILES[0]).write_text(json.dumps(cfg, indent=2) + "\n", encoding="utf-8")
