"""The feed's state of every process in one checkpoint, which the first process writes."""

from __future__ import annotations

from typing import Any

from quire.datasets.activations.beside import KEY
from quire.datasets.activations.buffer import Chunk
from quire.errors import ConfigError


def gathered(place: dict[str, Any], rows: Chunk, world: int) -> dict[str, Any]:
    """What the data module keeps: each rank's place, and all rows under ``beside``, named by rank."""
    states: list[Any] = [(place, rows)]
    if world > 1:
        import torch.distributed as dist

        states = [None] * world
        on_cpu = {k: v.detach().cpu() for k, v in rows.items()}
        if dist.get_rank() == 0:
            dist.gather_object((place, on_cpu), states)
        else:
            dist.gather_object((place, on_cpu))
            return {"ranks": [], KEY: {}}  # only the first rank's state is written
    merged = {f"{rank}.{k}": v for rank, (_, held) in enumerate(states) for k, v in held.items()}
    return {"ranks": [p for p, _ in states], KEY: merged}


def mine(state: dict[str, Any], rows: Chunk, world: int, rank: int) -> tuple[dict[str, Any], Chunk]:
    """This rank's place and rows. Raises ``ConfigError`` for another number of processes."""
    if len(state["ranks"]) != world:
        raise ConfigError(
            f"the checkpoint's feed ran on {len(state['ranks'])} processes, this run has {world}: resume with as many,"
            " or start anew from the weights"
        )
    own = {k.partition(".")[2]: v for k, v in rows.items() if k.startswith(f"{rank}.")}
    return state["ranks"][rank], own
