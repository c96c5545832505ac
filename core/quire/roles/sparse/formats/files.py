"""Which format a path has; reading and writing by name."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from quire.data import expand
from quire.errors import ConfigError, suggest
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.formats import attention, dictionary_learning, saelens, sparsify
from quire.roles.sparse.formats.weights import Weights, weights_of

if TYPE_CHECKING:
    from quire.model import Model

FORMATS: dict[str, ModuleType] = {f.NAME: f for f in (saelens, dictionary_learning, sparsify, attention)}


def read(path: str | Path, format: str = "auto") -> tuple[Weights, Path]:
    """(weights, the file they lie in) of a dictionary that another project wrote.

    Args:
        path: A folder, or for ``attention`` either file of a pair.
        format: ``saelens``, ``dictionary_learning``, ``sparsify``, ``attention``, or ``auto`` by the files there.

    Raises:
        ConfigError: an unknown format, files that are none, or something in them that Quire has no part for.
    """
    place = expand(path)
    name = _recognised(place) if format == "auto" else _known(format)
    weights: Weights = FORMATS[name].read(place)
    found = attention.pair(place) if name == "attention" else None
    return weights, found[0] if found else place / FORMATS[name].FILES[1]


def write(model: Model, path: str | Path, format: str = "saelens") -> Path:
    """Write a built model's dictionary as another project's files.

    Args:
        model: With a SparseEncoder and a SparseDecoder.
        path: A folder; made if missing.
        format: ``saelens``, ``dictionary_learning``, ``sparsify`` or ``attention``.

    Returns:
        The folder.

    Raises:
        ConfigError: no dictionary in the model, or one that the format can't hold.
    """
    name = _known(format)
    encoder = None if model.encoder is None else model.encoder.role(SparseEncoder)
    decoder = None if model.decoder is None else model.decoder.role(SparseDecoder)
    if encoder is None or decoder is None:
        raise ConfigError("a dictionary is written from a model with a SparseEncoder and a SparseDecoder")
    weights = weights_of(encoder, decoder, metadata(dict(model.spec or {})), name)
    folder = expand(path)
    folder.mkdir(parents=True, exist_ok=True)
    FORMATS[name].write(weights, folder)
    return folder


def metadata(spec: dict[str, Any]) -> dict[str, Any]:
    """What a spec says about where the activations are from, in the names that SAELens uses."""
    made: dict[str, Any] = {}
    if spec.get("subject"):
        made["model_name"] = str(spec["subject"])
    if spec.get("site"):
        made["hook_name"] = str(spec["site"])
    if spec.get("heads") and str(spec.get("site", "")).endswith(".z"):
        made |= {"reshape_activations": "hook_z", "heads": spec["heads"], "head_width": spec.get("head_width")}
    return made


def _known(name: str) -> str:
    if name not in FORMATS:
        raise ConfigError(f"no dictionary format is named {name}{suggest(name, list(FORMATS))}: {', '.join(FORMATS)}")
    return name


def _recognised(place: Path) -> str:
    if attention.pair(place):
        return attention.NAME
    for name, kind in FORMATS.items():
        if place.is_dir() and all((place / file).is_file() for file in kind.FILES):
            return name
    looked = "; ".join(f"{name}: {' and '.join(kind.FILES)}" for name, kind in FORMATS.items())
    raise ConfigError(f"{place} is no dictionary that Quire knows. Files looked for: {looked}")
