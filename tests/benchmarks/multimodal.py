"""MultiMAE at its reference sizes: what seeing 98 of 588 tokens costs, and what the decoders do beside the loss."""

from __future__ import annotations

import os
from typing import Any

import torch
from tests.benchmarks.clock import milliseconds, one_thread, race, ratio, table
from tests.benchmarks.shipped_models import noise, reference

ROWS = 1


def predicted(tokens: int, width: int, depth: int) -> int:
    """Multiplications and additions of a trunk: four D x D maps, an MLP of 4 D, and attention over all pairs."""
    return depth * tokens * (24 * width**2 + 4 * tokens * width)


def counted(run: Any) -> dict[str, float]:
    """Operations of a forward pass by module, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return {name: float(sum(by.values())) for name, by in counter.get_flop_counts().items()}


def main() -> None:
    """Print both tables."""
    from quire.plugins import load

    if "multimae" not in load().records:
        print("\nMultiMAE: plugin multimae is not installed")
        return
    model, batch = reference("multimae/vit_b"), noise(ROWS)
    encoder, width, depth = model.encoder, model.encoder.width, model.encoder.depth
    layout = encoder.layout(batch)
    subset = model.objective.masking.draw(layout, ROWS, None, torch.Generator().manual_seed(0))
    kept, cells = subset.keep.shape[1], layout.cells
    few = torch.randn(ROWS, kept + 1, width)

    def step(run: Any) -> Any:
        def once() -> None:
            run().square().mean().backward()
            encoder.zero_grad()

        return once

    arms = {
        "kept": step(lambda: encoder(batch, keep=subset).joined()),
        "trunk": step(lambda: run_blocks(encoder.blocks, few)),
        "all": step(lambda: encoder(batch).joined()),
    }
    with one_thread():
        spent = race(arms, repeats=int(os.environ.get("BENCH_STEPS", 3)), warmup=1)
    aim = predicted(kept + 1, width, depth) / predicted(cells + 1, width, depth)
    rows = [
        ["", "forward and backward, ms", "against", "measured", "predicted by tokens"],
        [f"encoder, {kept} of {cells}", milliseconds(spent["kept"]), "its trunk alone on as many tokens",
         ratio(spent["kept"], spent["trunk"]), "1"],
        ["", "", f"the encoder on all {cells}", ratio(spent["kept"], spent["all"]), f"{aim:.3f}"],
    ]  # fmt: skip
    table(f"MultiMAE's encoder, ViT-B, 3 modalities, batch {ROWS} (aim: within 10 % of what tokens predict)", rows)
    model.eval()
    codes = encoder(batch, keep=subset)
    found, whole = counted(lambda: model.decoder(codes, subset)), counted(lambda: encoder(batch, keep=subset))
    trunk = predicted(kept + 1, width, depth) * ROWS
    rows = [["", "of the decoder in its output map", "of that on visible cells, which no loss reads"]]
    seen = kept / cells
    for task, made in model.decoder.decoders.items():
        total = next(v for k, v in found.items() if k.endswith(f"decoders.{task}"))
        head = 2 * ROWS * model.decoder.segment(task, layout).cells * made.head.in_features * made.head.out_features
        rows.append([task, f"{100 * head / total:.1f} %", f"{100 * seen * head / total:.1f} % of the decoder"])
    spent_in = {"encoder": whole["Global"], "decoders": found["Global"]}
    table("MultiMAE's decoders: all cells of the own modality are queries, as in the paper", rows)
    print(f"  operations counted: encoder {spent_in['encoder'] / trunk:.3f} of what its trunk's tokens predict, "
          f"decoders {spent_in['decoders'] / spent_in['encoder']:.2f} of the encoder")  # fmt: skip


def run_blocks(blocks: Any, x: torch.Tensor) -> torch.Tensor:
    """timm's blocks, one after the other."""
    for block in blocks:
        x = block(x)
    return x


if __name__ == "__main__":
    main()
