"""How a TopK training step grows with the number of latents: Quire in ``Trainer.fit`` beside dense PyTorch by hand.

Each arm is a process of its own, so each has its own peak memory; both of a size take turns.
"""

from __future__ import annotations

from statistics import median

from tests.benchmarks.clock import milliseconds, ratio, table
from tests.benchmarks.sparse_speed import KEPT, ROOT, WIDTH, command
from tests.benchmarks.turns import Arm

SIZES, TOKENS = (2048, 8192, 32768), 1024


def main(repeats: int = 3, warmup: int = 1) -> None:
    """Print the table."""
    rows = [["latents", "dense, CPU ms", "quire, CPU ms", "over dense", "over a quarter", "dense, MiB", "quire, MiB"]]
    before: float | None = None
    for size in SIZES:
        arms = [Arm(command(name, size, TOKENS), ROOT) for name in ("dense", "fit")]
        for _ in range(repeats + warmup):
            for arm in arms:
                arm.step()
        for arm in arms:
            arm.end()
        dense, ours = (arm.spent[warmup:] for arm in arms)
        grown = "" if before is None else f"{median(ours) / before:.2f}"
        before = median(ours)
        cells = [str(size), milliseconds(dense), milliseconds(ours), ratio(ours, dense), grown]
        rows.append([*cells, *(f"{arm.grown:.0f}" for arm in arms)])
    table(f"TopK step by number of latents, width {WIDTH}, k {KEPT}, batch {TOKENS}; MiB of peak memory grown", rows)


if __name__ == "__main__":
    main()
