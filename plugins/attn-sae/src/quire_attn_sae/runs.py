"""The smallest complete run at a z site: what ``tiny()`` of this plugin's components is made from."""

from __future__ import annotations

from typing import Any


def tiny_run(analysis: bool = False, **model: Any) -> dict[str, Any]:
    """A dictionary of 24 latents at the z site of a small language model with random weights.

    Args:
        analysis: Feed whole samples with patterns and values.
        **model: Further parts of the model.
    """
    small = {"class_path": "CausalLM", "init_args": {"width": 16, "depth": 2, "heads": 2, "rope": False}}
    data: dict[str, Any] = {"subject": small, "site": "blocks.1.z", "source": "stdlib:docs", "length": 16}
    data |= {"train_samples": 64, "batch_size": 4, "analysis": True} if analysis else {}
    data |= {} if analysis else {"train_samples": 256, "batch_size": 64, "buffer": 1024}
    selector = {"class_path": "TopK", "init_args": {"k": 4}}
    return {
        "model": {
            "encoder": {"class_path": "SparseEncoder", "init_args": {"latents": 24, "selector": selector}},
            "decoder": "SparseDecoder",
            "objective": "SparseReconstruction",
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}},
            **model,
        },
        "data": {"class_path": "Activations", "init_args": data},
    }
