"""Quire: each paper's method is a plugin, and any part of one works with the parts of another, in YAML.

Public names are imported lazily: ``import quire`` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

from quire.hooks import hookimpl

__version__ = "0.1.0"

_LAZY = {
    "Batch": "contracts",
    "Codes": "contracts",
    "Component": "contracts",
    "Decoder": "contracts",
    "Encoder": "contracts",
    "Losses": "contracts",
    "Metric": "contracts",
    "Objective": "contracts",
    "Part": "contracts",
    "Sampler": "contracts",
    "Spec": "contracts",
    "DataModule": "data",
    "Fields": "data",
    "ConfigError": "errors",
    "DataError": "errors",
    "QuireError": "errors",
    "Model": "model",
    "Sum": "sum",
    "Pretrained": "checkpoint",
    "export": "checkpoint",
    "load": "checkpoint",
    "Claim": "reproduce",
}

__all__ = ["__version__", "hookimpl", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"quire.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'quire' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
