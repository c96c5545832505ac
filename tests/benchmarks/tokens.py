"""The masked autoencoder of role-tokens: a plain PyTorch loop, Quire's Model, and with ``--peers`` lightly."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tests.benchmarks.clock import milliseconds, ratio, table
from tests.benchmarks.turns import Arm, Turns, serve

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {
    "image": 224,
    "patch": 16,
    "masking": 0.75,
    "encoder": {"width": 192, "depth": 12, "heads": 3},
    "decoder": {"width": 128, "depth": 4, "heads": 4},
}
BATCH, IMAGES, RATE, DECAY = 16, 64, 1e-3, 0.05
ARMS = {"plain PyTorch": "plain", "quire": "quire"}


def images() -> torch.Tensor:
    """[IMAGES,3,224,224] of noise, the same everywhere."""
    return torch.rand(IMAGES, 3, SIZES["image"], SIZES["image"], generator=torch.Generator().manual_seed(0))


def optimizer_of(module: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW, no weight decay on vectors."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=RATE, weight_decay=DECAY)


def quire_model() -> Any:
    """The model, built, from a seed."""
    from quire import Model, Spec
    from quire.plugins import load
    from quire.recipe import instantiate

    load().registry.import_named(["ViTEncoder", "GridDecoder", "MaskedReconstruction", "Constant"])
    torch.manual_seed(0)
    encoder = {"patch": SIZES["patch"], "class_token": True, **SIZES["encoder"]}
    parts = {
        "encoder": {"class_path": "ViTEncoder", "init_args": encoder},
        "decoder": {"class_path": "GridDecoder", "init_args": SIZES["decoder"]},
        "objective": {"class_path": "MaskedReconstruction", "init_args": {"masking": SIZES["masking"]}},
        "schedule": {"class_path": "Constant"},
    }
    model = Model(**{k: instantiate(v) for k, v in parts.items()}, spec=Spec(image_size=SIZES["image"], channels=3))
    model.configure_model()
    return model


def run_plain(folder: Path) -> None:
    """The arm written by hand; it gets the other's start, order and noise as files, so it needs no Quire."""
    from tests.benchmarks.mae import MAE

    held, plan = images(), torch.load(folder / "plan.pt", weights_only=True)
    module = MAE(**SIZES)
    module.load_state_dict(torch.load(folder / "start.pt", weights_only=True))
    optimizer = optimizer_of(module)
    steps = iter(zip(plan["order"], plan["noise"]))

    def step() -> float:
        index, noise = next(steps)
        optimizer.zero_grad()
        loss = module(held[index], noise)
        loss.backward()
        optimizer.step()
        return loss.item()

    serve(step)


def run_quire(folder: Path) -> None:
    """``Trainer.fit`` with the Model; a callback waits before each batch and answers when the next one is there."""
    import lightning.pytorch as pl

    from quire import DataModule, Fields

    class Noise(DataModule):
        fields = ("image",)

        def split(self, name: str) -> Fields:
            return Fields(image=images())

        def sizes(self) -> dict[str, Any]:
            return {"image_size": SIZES["image"], "channels": 3}

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

    trainer = pl.Trainer(
        max_epochs=-1,
        accelerator="cpu",
        logger=pl.loggers.CSVLogger(folder),
        callbacks=[Told()],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
    )
    trainer.fit(quire_model(), datamodule=Noise(batch_size=BATCH))


def prepare(folder: Path, steps: int) -> None:
    """Write the start, the order of the images and the noise of every step."""
    from quire import Fields
    from quire.data import DataModule, mix

    class Order(DataModule):
        def split(self, name: str) -> Fields:
            return Fields(vector=torch.zeros(IMAGES, 1))

    torch.save(quire_model().state_dict(), folder / "start.pt")
    loader = Order(batch_size=BATCH).train_dataloader()
    order, noise, cells = [], [], (SIZES["image"] // SIZES["patch"]) ** 2
    for step in range(steps):
        epoch, place = divmod(step, IMAGES // BATCH)
        if not place:
            loader.sampler.set_epoch(epoch)
            batches = iter(loader)
        order.append(next(batches)["index"])
        key = mix(0, 0, epoch, place, 0)  # as Model seeds a training step
        noise.append(torch.rand(BATCH, cells, generator=torch.Generator().manual_seed(key)))
    torch.save({"order": order, "noise": noise}, folder / "plan.pt")


def main(peers: bool = False, repeats: int = 10, warmup: int = 2) -> None:
    """Print the table. The comparison is void, and says so, when the first ten losses differ by more than 1e-5."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder, repeats + warmup + 1)
        commands = {
            name: [sys.executable, "-m", "tests.benchmarks.tokens", arm, str(folder)] for name, arm in ARMS.items()
        }
        if peers:
            from tests.benchmarks.peers import COMMANDS

            commands |= {name: make() for name, make in COMMANDS.items()}
        arms = {name: Arm(command, ROOT) for name, command in commands.items()}
        for _ in range(repeats + warmup):
            for arm in arms.values():
                arm.step()
        for arm in arms.values():
            arm.end()
    plain = arms["plain PyTorch"]
    rows = [["", "CPU, ms a step", "over plain", "peak memory grown, MiB"]]
    for name, arm in arms.items():
        spent, base = arm.spent[warmup:], plain.spent[warmup:]
        rows.append([name, milliseconds(spent), ratio(spent, base), f"{arm.grown:.0f}"])
    table("Masked autoencoder, ViT 192x12, 224/16, batch 16, 75 % masked (aim: quire / plain at most 1.03)", rows)
    gap = max(abs(a - b) for a, b in zip(plain.losses[:10], arms["quire"].losses[:10]))
    verdict = "the same training" if gap <= 1e-5 else "VOID: not the same training"
    print(f"  largest difference of the first 10 losses: {gap:.1e}, {verdict}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"plain": run_plain, "quire": run_quire}[sys.argv[1]](Path(sys.argv[2]))
