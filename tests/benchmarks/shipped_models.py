"""Models of the shipped reference configs with random weights, and batches of noise for them."""

from __future__ import annotations

from typing import Any

import torch
import yaml

from quire import Model, Spec
from quire.plugins import load
from quire.recipe import instantiate

SPEC = {
    "image_size": [224, 224],
    "channels": 3,
    "modalities": {"depth": {"channels": 1}, "semantic": {"classes": 133, "size": [56, 56]}},
}


def reference(name: str, **changes: Any) -> Model:
    """The model of a shipped config for pictures of 224 pixels, built; ``changes`` to the objective's arguments."""
    content = yaml.safe_load(load().configs()[name].read_text(encoding="utf-8"))["model"]
    content["objective"]["init_args"].update(pictures=0, **changes)
    parts = {slot: content[slot] for slot in ("encoder", "decoder", "objective") if slot in content}
    load().registry.import_named(str(parts).replace("'", " ").split())
    torch.manual_seed(0)
    model = Model(**{slot: instantiate(part) for slot, part in parts.items()}, spec=Spec(SPEC))
    model.configure_model()
    return model


def noise(rows: int) -> dict[str, Any]:
    """An aligned image, depth and class map."""
    g = torch.Generator().manual_seed(0)
    return {
        "image": torch.rand(rows, 3, 224, 224, generator=g),
        "depth": torch.randn(rows, 1, 224, 224, generator=g),
        "semantic": torch.randint(133, (rows, 56, 56), generator=g),
        "index": torch.arange(rows),
    }
