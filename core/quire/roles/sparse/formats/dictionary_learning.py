"""dictionary_learning: ``config.json`` and ``ae.pt``; encoder.weight is [F,D], decoder.weight [D,F]."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from quire.errors import ConfigError
from quire.roles.sparse.formats.weights import Weights, as_rows, read_json, read_pickle, take

NAME = "dictionary_learning"
FILES = ("config.json", "ae.pt")
CLASSES = {
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "JumpReluAutoEncoder": "jumprelu",
}
TRAINERS = {
    "relu": "StandardTrainer",
    "topk": "TopKTrainer",
    "batchtopk": "BatchTopKTrainer",
    "jumprelu": "JumpReluTrainer",
}


def read(folder: Path) -> Weights:
    """A folder of it. Raises ``ConfigError`` for a class of dictionary that Quire has no selector for."""
    trainer = read_json(folder / FILES[0]).get("trainer")
    if not isinstance(trainer, dict):
        raise ConfigError(f"{folder / FILES[0]} has no 'trainer'")
    tensors = read_pickle(folder / FILES[1])
    name = trainer.get("dict_class", "AutoEncoder")
    if name not in CLASSES:
        raise ConfigError(f"{folder}: dict_class {name!r}; Quire reads {', '.join(CLASSES)}")
    metadata = {k: v for k, v in trainer.items() if isinstance(v, (str, int, float, bool))}
    if name == "JumpReluAutoEncoder":
        return Weights(
            W_enc=take(tensors, "W_enc", folder).T.contiguous(),
            W_dec=take(tensors, "W_dec", folder),
            b_enc=tensors.get("b_enc"),
            b_dec=tensors.get("b_dec"),
            selector="jumprelu",
            threshold=tensors.get("threshold"),
            subtract_bias=False,
            metadata=metadata,
        ).check(folder)
    rows = take(tensors, "encoder.weight", folder)
    latents, width = rows.shape
    if trainer.get("dict_size", latents) != latents:
        raise ConfigError(f"{folder}: encoder.weight is {list(rows.shape)}, dict_size says {trainer['dict_size']}")
    bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(name, "b_dec")
    k = tensors.get("k")
    return Weights(
        W_enc=rows,
        W_dec=take(tensors, "decoder.weight", folder).T.contiguous()
        if latents == width
        else as_rows(take(tensors, "decoder.weight", folder), latents, width, "decoder.weight", folder),
        b_enc=tensors.get("encoder.bias"),
        b_dec=tensors.get(bias),
        selector=CLASSES[name],
        k=int(k) if k is not None else trainer.get("k"),
        threshold=tensors.get("threshold") if name == "BatchTopKSAE" else None,
        subtract_bias=name != "AutoEncoderNew",
        metadata=metadata,
    ).check(folder)


def write(weights: Weights, folder: Path) -> None:
    """Write a folder. Raises ``ConfigError`` for what its classes have no place for."""
    if weights.norm != "none" or weights.transcoder:
        what = "transcoders" if weights.transcoder else f"norm: {weights.norm}"
        raise ConfigError(f"the dictionary_learning format has no {what}: use saelens, or a Quire checkpoint")
    kind = {v: k for k, v in CLASSES.items() if k != "AutoEncoderNew"}[weights.selector]
    if weights.selector == "relu" and not weights.subtract_bias:
        kind = "AutoEncoderNew"
    elif weights.selector == "jumprelu":
        weights = weights.without_bias_before()
    elif not weights.subtract_bias:
        raise ConfigError(f"dictionary_learning's {kind} subtracts b_dec; this encoder does not: use saelens")
    latents, width = weights.W_enc.shape
    zeros = weights.W_enc.new_zeros
    b_enc = zeros(latents) if weights.b_enc is None else weights.b_enc
    b_dec = zeros(width) if weights.b_dec is None else weights.b_dec
    if kind == "JumpReluAutoEncoder":
        assert weights.threshold is not None
        made = {"W_enc": weights.W_enc.T.contiguous(), "W_dec": weights.W_dec, "threshold": weights.threshold}
        made |= {"b_enc": b_enc, "b_dec": b_dec}
    else:
        bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(kind, "b_dec")
        made = {"encoder.weight": weights.W_enc, "encoder.bias": b_enc, bias: b_dec}
        made["decoder.weight"] = weights.W_dec.T.contiguous()
        if weights.k is not None:
            unset = torch.full((), -1.0)
            made["k"] = torch.tensor(weights.k, dtype=torch.int32)
            made["threshold"] = (unset if weights.threshold is None else weights.threshold).float()
    torch.save(made, folder / FILES[1])
    trainer: dict[str, Any] = {
        **weights.metadata,
        "trainer_class": TRAINERS[weights.selector],
        "dict_class": kind,
        "activation_dim": width,
        "dict_size": latents,
        "layer": weights.metadata.get("layer", 0),
        "lm_name": weights.metadata.get("model_name", "unknown"),
        "submodule_name": weights.metadata.get("hook_name"),
    }
    if weights.k is not None:
        trainer["k"] = weights.k
    (folder / FILES[0]).write_text(json.dumps({"trainer": trainer}, indent=2) + "\n", encoding="utf-8")
