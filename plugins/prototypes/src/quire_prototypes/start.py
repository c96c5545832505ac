"""Where prototypes may start other than at random: training codes, their centres, or rows of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from quire.checkpoint import read
from quire.data import expand
from quire.errors import ConfigError
from quire.model import Model
from quire_prototypes.modules import PrototypeLayer
from quire_prototypes.training import encode, need_source


def starting_codes(model: Model, layer: PrototypeLayer, asker: object) -> Tensor:
    """[m,q] for ``layer.init``; the same on every rank and in every run of one seed."""
    if "#" in layer.init:
        return rows_of(layer.init, layer.count, layer.prototypes.shape[1], model.seed)
    codes, labels = encode(model, need_source(model, asker))
    if len(codes) < layer.count:
        raise ConfigError(f"{layer.count} prototypes can't start on {len(codes)} training samples: lower prototypes")
    if layer.init == "kmeans":
        return centres(codes, layer.count, model.seed)
    return codes[spread(len(codes), labels, layer.count, model.seed).to(codes.device)]


def centres(codes: Tensor, count: int, seed: int) -> Tensor:
    """k-means centres [count,q] of codes [N,q], float32 on their device."""
    from sklearn.cluster import KMeans

    fitted = KMeans(count, n_init=4, random_state=seed % 2**32).fit(codes.cpu().numpy())
    return torch.from_numpy(fitted.cluster_centers_).float().to(codes.device)


def spread(total: int, labels: Tensor | None, count: int, seed: int) -> Tensor:
    """``count`` places of ``total``, drawn by seed, as even over the classes as they allow."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    if labels is None:
        return order[:count]
    shuffled = labels.cpu()[order]
    turn = torch.empty(total, dtype=torch.long)
    for value in shuffled.unique():
        own = shuffled == value
        turn[own] = torch.arange(int(own.sum()))
    return order[torch.argsort(turn, stable=True)[:count]]


def rows_of(where: str, count: int, width: int, seed: int) -> Tensor:
    """[count,width] out of ``"FILE#TENSOR"``; more rows than that are reduced to their k-means centres.

    Raises:
        ConfigError: no such file or tensor, rows of another width, or fewer rows than prototypes.
    """
    path, _, name = where.rpartition("#")
    file = expand(path)
    weights = _weights(file)
    if name not in weights:
        near = ", ".join(sorted(k for k, v in weights.items() if v.ndim > 1)[:8])
        raise ConfigError(f"PrototypeLayer.init: {file} has no tensor {name}; it has {near}")
    rows = weights[name].float()
    if rows.ndim < 2 or rows.shape[-1] != width:
        raise ConfigError(f"PrototypeLayer.init: {name} has shape {list(rows.shape)}, prototypes have {width} features")
    rows = rows.flatten(0, -2)
    if len(rows) < count:
        raise ConfigError(f"PrototypeLayer.init: {name} has {len(rows)} rows for {count} prototypes: lower prototypes")
    return rows if len(rows) == count else centres(rows, count, seed)


def _weights(file: Path) -> dict[str, Tensor]:
    if file.suffix != ".safetensors":
        return read(file)["state_dict"]
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise ConfigError(f"PrototypeLayer.init: there is no file {file}")
    try:
        return load_file(str(file))
    except SafetensorError as error:
        raise ConfigError(f"PrototypeLayer.init: {file} is no safetensors file, or is truncated") from error
