"""Memory of a training step at the papers' batch sizes: a formula, checked at two small batches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tests.benchmarks.clock import table
from tests.benchmarks.shipped_models import noise, reference
from tests.benchmarks.turns import MIB, peak

ROOT = Path(__file__).parents[2]
PAPERS = {"mp3/vit_b_imagenet": 256, "cae/vit_b": 64, "multimae/vit_b": 256}
"""Config → samples a process at its scale."""
CHECKED = (2, 4)


def model_of(name: str) -> Any:
    """The reference model; CAE with pixels as targets, because its tokenizer is a file of its own."""
    pixels = {"target": {"class_path": "PatchPixels"}} if name.startswith("cae/") else {}
    return reference(name, **pixels)


def held(model: Any, rows: int) -> int:
    """Bytes that autograd keeps of a forward pass for the backward one, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    found: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = (
                tensor.untyped_storage()
            )  # held, so that no place is used twice
        return tensor

    batch = noise(rows)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model.objective(model, batch)
    total = sum(storage.nbytes() for storage in found.values())
    del losses
    return total


def child(name: str, rows: int) -> None:
    """Two steps; prints parameters, what autograd keeps, and by how much the process's peak grew."""
    torch.set_num_threads(1)
    before = peak()
    model = model_of(name)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = noise(rows)
    for _ in range(2):  # the second has the optimizer's moments
        sum(model.objective(model, batch).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    grown = peak() - before
    number = sum(p.numel() for p in model.parameters())
    print(json.dumps({"parameters": number, "grown": grown}))


def main() -> None:
    """Print the table."""
    rows = [["config", "parameters", "MiB a sample", *(f"batch {b}: formula / measured" for b in CHECKED), "its batch"]]
    from quire.plugins import load

    for name, batch in PAPERS.items():
        if name not in load().configs():
            rows.append([name, "not installed", *[""] * (len(CHECKED) + 2)])
            continue
        model = model_of(name)
        sample = held(model, 2) - held(model, 1)
        fixed = 4 * sum(p.numel() for p in model.parameters())
        del model

        def formula(count: int, sample: int = sample, fixed: int = fixed) -> float:
            """Weights and two moments, and what is larger: activations, or gradients when they are all there."""
            return (3 * fixed + max(count * sample, fixed)) / MIB

        cells = []
        for count in CHECKED:
            command = [sys.executable, "-m", "tests.benchmarks.memory", name, str(count)]
            said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
            grown = json.loads(said.splitlines()[-1])["grown"]
            cells.append(f"{formula(count):.0f} / {grown:.0f} MiB, {formula(count) / grown:.2f}")
        at = f"{batch}: {formula(batch) / 1024:.0f} GiB"
        rows.append([name, f"{fixed / 4e6:.1f} M", f"{sample / MIB:.0f}", *cells, at])
    table("Memory of a float32 step of the reference sizes: 12 bytes a parameter + activations a sample x batch", rows)


if __name__ == "__main__":
    child(sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 1 else main()
