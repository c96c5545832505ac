"""SAELens: ``cfg.json`` and ``sae_weights.safetensors``; W_enc is [D,F], W_dec [F,D]."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from quire.errors import ConfigError
from quire.roles.sparse.formats.weights import Weights, read_json, read_safetensors, take

NAME = "saelens"
FILES = ("cfg.json", "sae_weights.safetensors")
ARCHITECTURES = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
}
NORMS = {"none": "none", "layer_norm": "layer"}


def read(folder: Path) -> Weights:
    """A folder of it. Raises ``ConfigError`` for an architecture or a normalisation that Quire has no part for."""
    cfg, tensors = read_json(folder / FILES[0]), read_safetensors(folder / FILES[1])
    architecture = cfg.get("architecture", "standard")
    if cfg.get("activation_fn_str", cfg.get("activation_fn")) == "topk":  # before version 6
        architecture = "topk"
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"{folder}: architecture {architecture!r}; Quire reads {', '.join(ARCHITECTURES)}")
    metadata = dict(cfg.get("metadata") or {})
    W_enc, W_dec = take(tensors, "W_enc", folder).T.contiguous(), take(tensors, "W_dec", folder)
    made = Weights(
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=tensors.get("b_enc"),
        b_dec=tensors.get("b_dec"),
        selector=ARCHITECTURES[architecture],
        k=cfg.get("k") or (cfg.get("activation_fn_kwargs") or {}).get("k"),
        threshold=tensors.get("threshold"),
        subtract_bias=bool(cfg.get("apply_b_dec_to_input", "transcoder" not in architecture)),
        norm=_norm(cfg, folder),
        transcoder="transcoder" in architecture,
        metadata={**metadata, **{k: cfg[k] for k in ("hook_name", "model_name") if k in cfg}},
    )
    made.metadata["reshape_activations"] = cfg.get("reshape_activations", "none")
    if cfg.get("rescale_acts_by_decoder_norm"):  # selection and codes are in units of unit rows
        norms = made.W_dec.norm(dim=1)
        made.W_enc, made.W_dec = made.W_enc * norms[:, None], made.W_dec / norms[:, None]
        made.b_enc = None if made.b_enc is None else made.b_enc * norms
    kept = metadata.get("quire")
    if isinstance(kept, dict) and kept.get("selector") == "batchtopk" and made.threshold is not None:
        made = replace(made, selector="batchtopk", k=int(kept["k"]), threshold=made.threshold[0])
    return made.check(folder)


def _norm(cfg: dict[str, Any], folder: Path) -> str:
    said = cfg.get("normalize_activations") or "none"
    if said not in NORMS:
        raise ConfigError(
            f"{folder}: normalize_activations {said!r} is not in the weights; Quire reads {', '.join(NORMS)}: "
            "fold it into the weights first"
        )
    return NORMS[said]


def write(weights: Weights, folder: Path) -> None:
    """Write a folder. A BatchTopK goes as jumprelu with one threshold, as SAELens does."""
    latents, width = weights.W_enc.shape
    metadata, selector, threshold = dict(weights.metadata), weights.selector, weights.threshold
    if selector == "batchtopk":
        if threshold is None or float(threshold) < 0:
            raise ConfigError("this BatchTopK has no threshold yet: train it before writing it as saelens")
        metadata["quire"] = {"selector": "batchtopk", "k": weights.k}
        selector, threshold = "jumprelu", threshold.expand(latents).contiguous()
    architecture = {"relu": "standard"}.get(selector, selector)
    if weights.transcoder:
        architecture = {"relu": "transcoder", "jumprelu": "jumprelu_transcoder"}.get(selector, "")
        if not architecture:
            raise ConfigError(f"the saelens format has no {selector} transcoder: keep it as a Quire checkpoint")
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": width,
        "d_sae": latents,
        "dtype": str(weights.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": weights.subtract_bias,
        "normalize_activations": {"layer": "layer_norm"}.get(weights.norm, weights.norm),
        "reshape_activations": metadata.pop("reshape_activations", "none"),
        "metadata": metadata,
    }
    if selector == "topk":
        cfg |= {"k": weights.k, "rescale_acts_by_decoder_norm": False}
    if weights.transcoder:
        cfg["d_out"] = weights.W_dec.shape[1]
    zeros = weights.W_enc.new_zeros
    tensors = {
        "W_enc": weights.W_enc.T.contiguous(),
        "W_dec": weights.W_dec.contiguous(),
        "b_enc": zeros(latents) if weights.b_enc is None else weights.b_enc,
        "b_dec": zeros(weights.W_dec.shape[1]) if weights.b_dec is None else weights.b_dec,
    }
    if selector == "jumprelu" and threshold is not None:
        tensors["threshold"] = threshold
    save_file(tensors, folder / FILES[1])
    (folder / FILES[0]).write_text(json.dumps(cfg, indent=2) + "\n", encoding="utf-8")
