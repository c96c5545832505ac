"""The attention-SAE release (Kissane et al. 2024): ``<name>.pt``, ``<name>_cfg.json``; W_enc is [D,F], W_dec [F,D]."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from quire.errors import ConfigError
from quire.roles.sparse.formats.weights import Weights, read_json, read_pickle, take

NAME = "attention"
FILES = ("<name>.pt", "<name>_cfg.json")


def pair(path: Path) -> tuple[Path, Path] | None:
    """(weights, config) of a path to either file, to its stem, or to a folder with one pair; None if there is none."""
    if path.is_dir():
        found = sorted(path.glob("*_cfg.json"))
        return pair(found[0]) if len(found) == 1 else None
    stem = path.name.removesuffix("_cfg.json").removesuffix(".pt")
    weights, cfg = path.with_name(f"{stem}.pt"), path.with_name(f"{stem}_cfg.json")
    return (weights, cfg) if weights.is_file() and cfg.is_file() else None


def read(path: Path) -> Weights:
    """A pair of files. Raises ``ConfigError``."""
    found = pair(path)
    if found is None:
        raise ConfigError(f"{path} has no pair <name>.pt and <name>_cfg.json")
    tensors, cfg = read_pickle(found[0]), read_json(found[1])
    made = Weights(
        W_enc=take(tensors, "W_enc", found[0]).T.contiguous(),
        W_dec=take(tensors, "W_dec", found[0]),
        b_enc=tensors.get("b_enc"),
        b_dec=tensors.get("b_dec"),
        selector="relu",
        metadata={k: v for k, v in cfg.items() if isinstance(v, (str, int, float, bool))},
    ).check(found[0])
    for key, size in zip(("dict_size", "act_size"), made.W_enc.shape):
        if cfg.get(key, size) != size:
            raise ConfigError(f"{found[1]} says {key} {cfg[key]}, the weights have {size}")
    return made


def write(weights: Weights, folder: Path) -> None:
    """Write a pair named ``dictionary`` into a folder. Raises ``ConfigError`` for anything but ReLU as released."""
    if weights.selector != "relu" or weights.norm != "none" or weights.transcoder or not weights.subtract_bias:
        raise ConfigError("the attention format holds ReLU dictionaries that subtract b_dec: use saelens")
    latents, width = weights.W_enc.shape
    zeros = weights.W_enc.new_zeros
    tensors = {
        "W_enc": weights.W_enc.T.contiguous(),
        "W_dec": weights.W_dec,
        "b_enc": zeros(latents) if weights.b_enc is None else weights.b_enc,
        "b_dec": zeros(width) if weights.b_dec is None else weights.b_dec,
    }
    torch.save(tensors, folder / "dictionary.pt")
    cfg = {**weights.metadata, "act_size": width, "dict_size": latents}
    cfg.setdefault("act_name", weights.metadata.get("hook_name", "hook_z"))
    (folder / "dictionary_cfg.json").write_text(json.dumps(cfg, indent=2) + "\n", encoding="utf-8")
