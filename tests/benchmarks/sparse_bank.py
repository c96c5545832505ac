"""A sweep of four dictionaries on one site: one ``DictionaryBank`` against four runs, one after the other.

Both sides are whole fits on ``Activations``, the filling of the buffer included; both train the same dictionaries on
the same tokens. What a bank saves is the subject's forward passes, so the ratio depends on how much these are of a run.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import lightning.pytorch as pl
from tests.benchmarks.clock import one_thread, ratio, table
from tests.benchmarks.harvest import LENGTH, Ids, subject

from quire import Model
from quire.datasets.activations.module import Activations
from quire.roles.sparse.bank import BankMember, DictionaryBank
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.objective import SparseReconstruction
from quire.roles.sparse.selectors import TopK
from quire.schedule import Constant

KEPT = (8, 16, 32, 64)
ADAM: Any = {"class_path": "torch.optim.Adam", "init_args": {"lr": 4e-4, "fused": True}}
SHAPES = {
    "tiny": ((64, 3, 4), "blocks.1.resid", 512, 1024),
    "larger": ((256, 6, 8), "blocks.3.resid", 2048, 2048),
}
"""Width, layers and heads; site; latents; rows a batch."""
STEPS = 8


def fit(model: Model, data: Activations) -> float:
    """CPU seconds of a fit over ``STEPS`` batches."""
    trainer = pl.Trainer(
        max_steps=STEPS,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    start = time.process_time()
    trainer.fit(model, datamodule=data)
    return time.process_time() - start


def encoder(latents: int, k: int) -> SparseEncoder:
    """One dictionary's encoder."""
    return SparseEncoder(latents, TopK(k), init="zeros")


def main(repeats: int = 2) -> None:
    """Print the table."""
    rows = [["subject's shape", "four runs, CPU s", "one bank, CPU s", "bank / four", "subject's share of a run"]]
    with one_thread():
        for name, (shape, site, latents, batch) in SHAPES.items():
            rows.append(
                [f"{name}: width {shape[0]}, latents {latents}", *measured(shape, site, latents, batch, repeats)]
            )
    kept = ", ".join(map(str, KEPT))
    table(f"Four TopK dictionaries (k {kept}) on one site, {STEPS} steps: median of {repeats} turns (minimum)", rows)


def measured(shape: tuple[int, int, int], site: str, latents: int, batch: int, repeats: int) -> list[str]:
    """One row's cells."""
    studied, source, samples = subject(*shape), Ids(), STEPS * batch // LENGTH

    def data() -> Activations:
        return Activations(studied, site, source, contexts=8, batch_size=batch, buffer=4 * batch, train_samples=samples)

    def bank() -> float:
        members = [BankMember(encoder(latents, k)) for k in KEPT]
        return fit(Model(objective=DictionaryBank(members), optimizer=ADAM, schedule=Constant()), data())

    def four() -> float:
        return sum(fit(single(k), data()) for k in KEPT)

    def single(k: int) -> Model:
        return Model(encoder(latents, k), SparseDecoder(), SparseReconstruction(), optimizer=ADAM, schedule=Constant())

    def passes() -> float:
        chunks = data().forwards("train")
        start = time.process_time()
        for what in chunks.plan(0, False):
            chunks.read(what)
        return time.process_time() - start

    four_s, bank_s, passes_s = map(list, zip(*[(four(), bank(), passes()) for _ in range(repeats)]))
    share = f"{median(passes_s) / median(four_s) * len(KEPT):.2f}"
    return [seconds(four_s), seconds(bank_s), ratio(bank_s, four_s), share]


def seconds(times: list[float]) -> str:
    """``median (minimum)``."""
    return f"{median(times):.2f} ({min(times):.2f})"


if __name__ == "__main__":
    main()
