"""``python -m tests.benchmarks [NAME …] [--peers]``: every table in turn. Numbers are printed, none is judged."""

from __future__ import annotations

import argparse
import os

from tests.benchmarks import (
    aggressive,
    ariel,
    context,
    dae_score,
    dkvb,
    drafts,
    first,
    harvest,
    loop,
    memory,
    multimodal,
    pipeline,
    shipped,
    sparse_bank,
    sparse_growth,
    sparse_runs,
    sparse_speed,
    startup,
    tokens,
    universal,
)
from tests.benchmarks.clock import machine

BENCHMARKS = {
    "startup": startup.main,
    "loop": loop.main,
    "context": context.main,
    "tokens": tokens.main,
    "first": first.main,
    "aggressive": aggressive.main,
    "drafts": drafts.main,
    "universal": universal.main,
    "ariel": ariel.main,
    "dae-score": dae_score.main,
    "dkvb": dkvb.main,
    "sparse": sparse_speed.main,
    "sparse-growth": sparse_growth.main,
    "sparse-bank": sparse_bank.main,
    "sparse-runs": sparse_runs.main,
    "harvest": harvest.main,
    "multimodal": multimodal.main,
    "memory": memory.main,
    "pipeline": pipeline.main,
    "shipped": shipped.main,
}
COMPARED = ("tokens", "sparse", "sparse-runs")
"""Those that ``--peers`` adds arms to."""


def main() -> None:
    """Run those named, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--peers", action="store_true", help="also other projects, installed under .peers/")
    options = parser.parse_args()
    unknown = [n for n in options.names if n not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark is named {unknown[0]}; there are {', '.join(BENCHMARKS)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(machine())
    print("One thread, CPU time, arms in turn; median (minimum).")
    for name, run in BENCHMARKS.items():
        if not options.names or name in options.names:
            run(peers=True) if name in COMPARED and options.peers else run()
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
