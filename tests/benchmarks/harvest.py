"""What harvesting costs over the bare forward pass of the subject, and what three more sites cost in one pass."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tests.benchmarks.clock import milliseconds, one_thread, race, ratio, table

from quire.contracts import Spec, build
from quire.data import DataModule, Fields
from quire.datasets.activations.feed import Feed, as_batch
from quire.datasets.activations.module import Activations
from quire.datasets.activations.shards import Writer
from quire.roles.language.hf import HFCausal

FOUR = ("resid", "mlp_out", "attn_out", "z")
VOCAB, LENGTH, ROWS, SAMPLES = 1000, 128, 8, 512
SHAPES = {"tiny": (64, 3, 4, 16), "larger": (256, 6, 8, 4)}
"""Width, layers, heads, and forward passes a turn."""


class Ids(DataModule):
    """Rows of random ids."""

    fields = ("tokens",)

    def sizes(self) -> dict[str, Any]:
        return {"vocab_size": VOCAB, "length": LENGTH, "pad": 0}

    def split(self, name: str) -> Fields:
        return Fields(tokens=torch.randint(1, VOCAB, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0)))


class Stop(Exception):
    """Ends the bare pass."""


def subject(width: int, layers: int, heads: int) -> HFCausal:
    """A GPT-2 of some shape with random weights."""
    sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": LENGTH, "vocab_size": VOCAB}
    torch.manual_seed(0)
    made = HFCausal(config={"model_type": "gpt2", **sizes})
    build(made, Spec({"vocab_size": VOCAB, "length": LENGTH, "pad": 0}))
    return made.eval().requires_grad_(False)


def bare(model: HFCausal, block: int, tokens: torch.Tensor) -> Callable[[], Any]:
    """The subject's own forward pass up to the end of a block: by hand, nothing kept."""

    def stop(*_: Any) -> None:
        raise Stop

    def run() -> None:
        for start in range(0, len(tokens), ROWS):
            handle = model.module.transformer.h[block].register_forward_hook(stop)
            with torch.no_grad(), contextlib.suppress(Stop):
                model.module(input_ids=tokens[start : start + ROWS], use_cache=False)
            handle.remove()

    return run


def main(repeats: int = 5) -> None:
    """Print both tables for each shape."""
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        for name, (width, layers, heads, passes) in SHAPES.items():
            block = layers // 2
            model, source = subject(width, layers, heads), Ids()
            tokens = source.dataset("train").tensors["tokens"][: passes * ROWS]  # type: ignore[attr-defined]
            single = feed(model, source, f"blocks.{block}.resid", passes)
            several = feed(
                model, source, [f"blocks.{block}.{k}" for k in ("resid", "mlp_out", "attn_out", "z")], passes
            )
            arms = {
                "bare forward": bare(model, block, tokens),
                "harvest": harvest(single, passes, Path(folder)),
                "stream": stream(single, passes),
                "one site": reading(single, passes),
                "four sites": reading(several, passes),
            }
            report(
                f"GPT-2 shape {name}, width {width}, {block + 1} of {layers} blocks run", race(arms, repeats), passes
            )


def feed(model: HFCausal, source: Ids, site: Any, passes: int) -> Activations:
    """A feed of one or several sites; half of the buffer is what the passes give, so each turn refills it once."""
    return Activations(model, site, source, contexts=ROWS, batch_size=1024, buffer=2 * passes * ROWS * LENGTH)


def harvest(data: Activations, passes: int, folder: Path) -> Callable[[], Any]:
    """As the command does it: passes, and their rows written as one shard."""
    chunks = data.forwards("train")
    plan = chunks.plan(0, False)[:passes]

    def run() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            writer = Writer(Path(place), 0, passes * ROWS * LENGTH)
            for what in plan:
                writer.add(chunks.read(what))
            writer.close()

    return run


def stream(data: Activations, passes: int) -> Callable[[], Any]:
    """Batches of the mixing buffer, as many rows as the passes give, in its steady state."""
    data.train_dataloader()
    chunks: Any = data.forwards("train")
    endless: Any = Feed(_Again(chunks), 1024, data.capacity, 0.5, 0, lambda r: as_batch(r, data.sites, []))
    batches: Iterator[Any] = iter(endless)
    for _ in range(data.capacity // 2048):
        next(batches)

    def run() -> None:
        for _ in range(passes * ROWS * LENGTH // 1024):
            next(batches)

    return run


class _Again:
    """The same chunks for as long as anybody asks."""

    def __init__(self, chunks: Any) -> None:
        self.chunks = chunks

    def plan(self, epoch: int, shuffle: bool, rank: int = 0, world: int = 1) -> list[Any]:
        return self.chunks.plan(0, False) * 10

    def fed(self, plan: list[Any]) -> int:
        return len(plan) * ROWS * LENGTH

    def read(self, what: Any) -> Any:
        return self.chunks.read(what)


def reading(data: Activations, passes: int) -> Callable[[], Any]:
    """Chunks of rows, not kept."""
    chunks = data.forwards("train")
    plan = chunks.plan(0, False)[:passes]
    return lambda: [len(chunks.read(what)) for what in plan]


def report(title: str, spent: dict[str, list[float]], passes: int) -> None:
    """One table: milliseconds, tokens a second, and rate over the arm that it stands against."""
    count = passes * ROWS * LENGTH
    against = {"harvest": "bare forward", "stream": "bare forward", "four sites": "one site"}
    rows = [["arm", "ms", "tokens/s", "", "", ""]]
    for name, times in spent.items():
        other = spent[against[name]] if name in against else None
        cells = ["", "", ""]
        if other is not None:
            cells = [f"{median(other) / median(times):.3f}x the rate", f"{ratio(times, other)} the time"]
            cells.append(f"of {against[name]}")
        rows.append([name, milliseconds(times), f"{count / median(times):.0f}", *cells])
    table(title, rows)


if __name__ == "__main__":
    main()
