"""Fully sharded training: every process holds its share of each block and gathers one block at a time.

Chosen by Lightning's ``ModelParallelStrategy``; the method is PyTorch's ``fully_shard`` (Zhao et al. 2023, FSDP).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as group
from torch import nn

from quire.checkpoint import WholeFiles, is_sharded
from quire.commands import Arguments
from quire.errors import ConfigError

if TYPE_CHECKING:
    from quire.model import Model

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


def build_sharded(model: Model, build: Callable[[], None], mesh: Any) -> None:
    """Build on rank 0, elsewhere on the meta device without memory; shard; hand out rank 0's weights.

    Args:
        model: Not built yet.
        build: What builds its parts.
        mesh: Lightning's device mesh; its dimension ``data_parallel`` is sharded over.

    Raises:
        ConfigError: tensor parallelism, or an objective with several players, which need code of their own.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if mesh["tensor_parallel"].size() > 1:
        raise ConfigError(
            "trainer.strategy: Quire shards over data_parallel only: set data_parallel_size to the number of "
            "processes and tensor_parallel_size: 1"
        )
    if getattr(model.objective, "players", ()):
        raise ConfigError(
            f"trainer.strategy: {type(model.objective).__name__} has several players, which can't be sharded: use ddp"
        )
    first = group.get_rank() == 0
    if first:
        build()
    else:
        with torch.device("meta"):
            build()
    whole = model.state_dict() if first else {}
    rows = mesh["data_parallel"]
    for block in _blocks(model):
        fully_shard(block, mesh=rows)
    fully_shard(model, mesh=rows)
    for step in _STEPS:
        register_fsdp_forward_method(model, step)
    kept = [(owner, name, buffer.detach().clone()) for owner, name, buffer in _buffers(model)]
    if not first:
        model.to_empty(device=mesh.device_type)
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for owner, name, value in kept:  # those that no checkpoint keeps, such as fixed tables
        value = value.to(mesh.device_type) if first else torch.empty_like(value, device=mesh.device_type)
        group.broadcast(value, 0)
        owner._buffers[name] = value


def _blocks(model: Model) -> Iterator[nn.Module]:
    """The repeated blocks: members of ModuleLists that hold weights, outermost first only."""

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(m) for m in child}) == 1:
                yield from (m for m in child if any(True for _ in m.parameters()))
            else:
                yield from walk(child)

    for part in (model.encoder, model.decoder):
        if part is not None:
            yield from walk(part)


def _buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for owner in model.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                yield owner, name, buffer


def consolidate(argv: list[str]) -> int:
    """``quire consolidate FOLDER -o FILE``: one checkpoint file, for ``quire.load``, out of a folder of shards."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    parser = Arguments(prog="quire consolidate", description="one checkpoint file out of a folder of shards")
    parser.add_argument("folder", help="a checkpoint that ModelParallelStrategy wrote")
    parser.add_argument("-o", "--output", help="the file to write; default: beside the folder, whole-NAME")
    options = parser.parse_args(argv)
    folder = Path(options.folder)
    if not is_sharded(folder):
        raise ConfigError(f"{folder} is not a folder of shards: it needs .metadata and meta.pt")
    target = Path(options.output or folder.with_name(f"whole-{folder.name}"))
    with tempfile.TemporaryDirectory() as room:
        part = Path(room) / "weights.pt"
        dcp_to_torch_save(str(folder), str(part))
        weights = torch.load(part, weights_only=True)["state_dict"]
    rest = torch.load(folder / "meta.pt", weights_only=True)
    WholeFiles().save_checkpoint({**rest, "state_dict": weights}, target)
    print(f"wrote {target}: the weights; the optimizer's state stays in the shards")
    return 0
