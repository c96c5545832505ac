"""The smallest runs of this plugin's parts."""

from __future__ import annotations

from typing import Any

TRUNK = {"width": 16, "depth": 1, "heads": 2}
ENCODER = {
    "class_path": "ViTEncoder",
    "init_args": {"patch": 2, **TRUNK, "class_token": True, "key_bias": False, "layer_scale": 0.1, "start": "xavier"},
}
REGRESSOR = {"class_path": "LatentRegressor", "init_args": {"depth": 1, "heads": 2}}
DECODER = {"class_path": "MaskedTokenDecoder", "init_args": {"depth": 1, "heads": 2}}
BLOCKS = {"class_path": "BlockMask", "init_args": {"min_block": 2}}
DIGITS = {"class_path": "Digits", "init_args": {"batch_size": 32}}


def tiny_run(target: Any = None, regressor: Any = None, data: Any = None, **objective: Any) -> dict[str, Any]:
    """A context autoencoder on digits.

    Args:
        target: What is predicted; the default is 16 clusters of patches.
        regressor: Another regressor.
        data: Another data module.
        **objective: Further arguments of ContextAutoencoding.
    """
    few = {"class_path": "KMeansPatches", "init_args": {"clusters": 16, "images": 256}}
    arguments = {"regressor": regressor or REGRESSOR, "masking": BLOCKS, "target": target or few, "pictures": 0}
    if objective.get("reconstruct") is False:
        del arguments["target"]
    model = {
        "encoder": ENCODER,
        "decoder": DECODER,
        "objective": {"class_path": "ContextAutoencoding", "init_args": {**arguments, **objective}},
    }
    if objective.get("reconstruct") is False:
        del model["decoder"]
    return {"model": model, "data": data or DIGITS}
