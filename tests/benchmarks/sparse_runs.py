"""End to end: a dictionary of a language model's activations, by ``Trainer.fit`` and by SAELens's own training runner.

Same GPT-2 shape with random weights, rows of ids, site, sizes, batch, buffer, optimizer and number of tokens. A turn is
a process; the CPU time is that of the run alone, the filling of the buffer included, without imports or the building
of models. Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from statistics import median
from typing import Any

import torch
from tests.benchmarks.clock import ratio, table
from tests.benchmarks.peers import ROOT, RUNNERS

WIDTH, LAYERS, HEADS, BLOCK = 256, 6, 8, 3
VOCAB, LENGTH, CONTEXTS = 1000, 128, 8
LATENTS, KEPT, BATCH, STEPS, RATE = 2048, 32, 2048, 12, 4e-4
TOKENS, BUFFER = STEPS * BATCH, 4 * BATCH
GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": LENGTH, "vocab_size": VOCAB}


def ids() -> torch.Tensor:
    """[N,LENGTH] of random ids, the same everywhere; twice what is trained on, so that no buffer runs empty."""
    return torch.randint(1, VOCAB, (2 * TOKENS // LENGTH, LENGTH), generator=torch.Generator().manual_seed(0))


def answer(run: Any) -> None:
    """Time a function that returns the number of steps it took, and print what came of it."""
    start = time.process_time()
    steps = run()
    print("\n" + json.dumps({"seconds": time.process_time() - start, "steps": steps}), flush=True)


def ours() -> None:
    """``Trainer.fit`` on ``Activations``, with a CSV log."""
    import tempfile

    import lightning.pytorch as pl
    from tests.benchmarks.harvest import subject

    from quire import DataModule, Fields, Model
    from quire.datasets.activations.module import Activations
    from quire.roles.sparse.decoder import SparseDecoder
    from quire.roles.sparse.encoder import SparseEncoder
    from quire.roles.sparse.objective import SparseReconstruction
    from quire.roles.sparse.selectors import TopK
    from quire.schedule import Constant

    class Ids(DataModule):
        fields = ("tokens",)

        def sizes(self) -> dict[str, Any]:
            return {"vocab_size": VOCAB, "length": LENGTH, "pad": 0}

        def split(self, name: str) -> Fields:
            return Fields(tokens=ids())

    studied, adam = subject(WIDTH, LAYERS, HEADS), {"lr": RATE}
    data = Activations(studied, f"blocks.{BLOCK}.resid", Ids(), contexts=CONTEXTS, batch_size=BATCH, buffer=BUFFER)
    model = Model(
        SparseEncoder(LATENTS, TopK(KEPT), init="zeros"),
        SparseDecoder(),
        SparseReconstruction(),
        optimizer={"class_path": "torch.optim.Adam", "init_args": adam},  # type: ignore[arg-type]
        schedule=Constant(),
    )
    with tempfile.TemporaryDirectory() as place:
        trainer = pl.Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            logger=pl.loggers.CSVLogger(place),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )

        def run() -> int:
            trainer.fit(model, datamodule=data)
            return trainer.global_step

        answer(run)


def turn(command: list[str]) -> float:
    """CPU seconds of one run; it must have taken all steps."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    said = json.loads(done.stdout.splitlines()[-1])
    if said["steps"] != STEPS:
        raise RuntimeError(f"{' '.join(command)} took {said['steps']} steps, not {STEPS}")
    return float(said["seconds"])


def main(peers: bool = False, repeats: int = 3) -> None:
    """Print the table."""
    commands = {"quire, Trainer.fit": [sys.executable, "-m", "tests.benchmarks.sparse_runs"]}
    if peers:
        commands |= {name: make() for name, make in RUNNERS.items()}
    spent: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            spent[name].append(turn(command))
    first = spent["quire, Trainer.fit"]
    rows = [["run", "CPU s", "tokens per CPU-s", "time over Quire's"]]
    for name, times in spent.items():
        seconds = f"{median(times):.2f} ({min(times):.2f})"
        rows.append([name, seconds, f"{TOKENS / median(times):.0f}", ratio(times, first)])
    shape = f"width {WIDTH}, {BLOCK + 1} of {LAYERS} blocks run, latents {LATENTS}, k {KEPT}, batch {BATCH}"
    table(f"TopK on a GPT-2 shape, end to end: {shape}, {TOKENS} tokens", rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    ours()
