"""One training step of a TopK dictionary: dense by hand, Quire's sparse path, and with ``--peers`` other projects.

Shape, rows and learning rate are the same in every arm; each arm is a process of its own, so each has its own peak
memory. ``step`` runs Quire's parts in a hand loop, ``fit`` in ``Trainer.fit`` as users run it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tests.benchmarks.clock import milliseconds, ratio, table
from tests.benchmarks.turns import MIB, Arm, Turns, serve

ROOT = Path(__file__).parents[2]
WIDTH, LATENTS, KEPT, TOKENS, RATE = 512, 4096, 32, 4096, 4e-4


def rows(tokens: int = TOKENS) -> torch.Tensor:
    """[2*tokens,WIDTH] of noise, the same everywhere."""
    return torch.randn(2 * tokens, WIDTH, generator=torch.Generator().manual_seed(0))


def batches(tokens: int = TOKENS) -> Callable[[], torch.Tensor]:
    """Batches in turn."""
    held, place = rows(tokens), [0]

    def following() -> torch.Tensor:
        place[0] += 1
        start = place[0] % 2 * tokens
        return held[start : start + tokens]

    return following


def run_dense(latents: int, tokens: int) -> None:
    """Plain PyTorch."""
    from tests.benchmarks.sparse_dense import Dense, step_of

    torch.manual_seed(0)
    following, step = batches(tokens), step_of(Dense(WIDTH, latents, KEPT), RATE)
    serve(lambda: step(following()))


def model(latents: int = LATENTS) -> Any:
    """Quire's, built."""
    from quire import Model
    from quire.plugins import load
    from quire.recipe import instantiate

    names = ["SparseEncoder", "SparseDecoder", "SparseReconstruction", "TopK", "Constant"]
    load().registry.import_named(names)
    torch.manual_seed(0)
    selector = {"class_path": "TopK", "init_args": {"k": KEPT}}
    encoder = {"class_path": "SparseEncoder", "init_args": {"latents": latents, "selector": selector, "init": "zeros"}}
    made = Model(
        encoder=instantiate(encoder),
        decoder=instantiate({"class_path": "SparseDecoder"}),
        objective=instantiate({"class_path": "SparseReconstruction"}),
        optimizer={"class_path": "torch.optim.Adam", "init_args": {"lr": RATE, "fused": True}},  # type: ignore[arg-type]
        schedule=instantiate({"class_path": "Constant"}),
        spec={"width": WIDTH},
    )
    made.configure_model()
    return made.train()


def run_step(latents: int, tokens: int) -> None:
    """Quire's parts in a loop written by hand."""
    from quire.roles.sparse.dead import count
    from quire.roles.sparse.rows import project, renormalise

    made, following = model(latents), batches(tokens)
    optimizer = torch.optim.Adam(made.parameters(), lr=RATE, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        losses = made.objective(made, {"activation": following()})
        losses["reconstruct"].backward()
        project(made.decoder.W_dec, made.decoder.W_dec.grad)
        optimizer.step()
        renormalise(made.decoder.W_dec)
        count(made.decoder, losses.outputs["fired"], losses.outputs["tokens"])
        return losses["reconstruct"].item()

    serve(step)


def run_fit(latents: int, tokens: int) -> None:
    """``Trainer.fit``; a callback waits before each batch and answers when the next one is there."""
    import lightning.pytorch as pl

    from quire import DataModule, Fields

    class Noise(DataModule):
        fields = ("activation",)

        def split(self, name: str) -> Fields:
            return Fields(activation=rows(tokens))

        def sizes(self) -> dict[str, Any]:
            return {"width": WIDTH}

    class Told(pl.Callback):
        turns: Turns | None = None
        loss = 0.0

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> int | None:
            if self.turns is None:
                self.turns = Turns()
            else:
                self.turns.done(self.loss)
            if not self.turns.told():
                trainer.should_stop = True
                return -1
            return None

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.loss = outputs["loss"].item()

    with tempfile.TemporaryDirectory() as place:
        trainer = pl.Trainer(
            max_epochs=-1,
            accelerator="cpu",
            logger=pl.loggers.CSVLogger(place),
            callbacks=[Told()],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            limit_val_batches=0,
        )
        trainer.fit(model(latents), datamodule=Noise(batch_size=tokens))


def parts() -> list[list[str]]:
    """What the limit is made of: the dense encode and the selection, alone, in this process."""
    from tests.benchmarks.clock import one_thread, race

    x, weight = rows()[:TOKENS], torch.randn(LATENTS, WIDTH)
    z = x @ weight.T
    with one_thread(), torch.no_grad():
        arms: dict[str, Callable[[], Any]] = {
            "encode alone": lambda: torch.nn.functional.linear(x, weight),
            "top-k alone": lambda: z.topk(KEPT, 1, sorted=False),
        }
        return [[name, milliseconds(spent), "", "", ""] for name, spent in race(arms, repeats=3, warmup=1).items()]


ARMS: dict[str, Callable[[int, int], None]] = {"dense": run_dense, "step": run_step, "fit": run_fit}


def main(peers: bool = False, repeats: int = 6, warmup: int = 2) -> None:
    """Print the table."""
    commands = {f"quire, {n}" if n != "dense" else "dense by hand": command(n) for n in ARMS}
    if peers:
        from tests.benchmarks.peers import SPARSE

        commands |= {name: make() for name, make in SPARSE.items()}
    arms = {name: Arm(told, ROOT) for name, told in commands.items()}
    for _ in range(repeats + warmup):
        for arm in arms.values():
            arm.step()
    for arm in arms.values():
        arm.end()
    dense = arms["dense by hand"].spent[warmup:]
    found = [["", "CPU, ms a step", "tokens per CPU-s", "over dense", "peak memory grown, MiB"]]
    for name, arm in arms.items():
        spent = arm.spent[warmup:]
        found.append(
            [name, milliseconds(spent), f"{TOKENS / median(spent):.0f}", ratio(spent, dense), f"{arm.grown:.0f}"]
        )
    shape = f"{WIDTH} to {LATENTS}, k {KEPT}, batch {TOKENS}, float32"
    table(f"TopK dictionary, {shape} (aim: quire / dense at most 0.4)", found + parts())
    large, small = TOKENS * KEPT * WIDTH * 4 / MIB, TOKENS * LATENTS * 4 / MIB
    print(f"  a tensor [N,K,D] would take {large:.0f} MiB, one [N,F] {small:.0f} MiB")


def command(arm: str, latents: int = LATENTS, tokens: int = TOKENS) -> list[str]:
    """How to start an arm."""
    return [sys.executable, "-m", "tests.benchmarks.sparse_speed", arm, str(latents), str(tokens)]


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    ARMS[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]))
