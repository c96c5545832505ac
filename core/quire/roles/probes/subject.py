"""The encoder under test: features of a split, its untrained twin, and the promise to change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader

from quire.contracts import Batch, Component, Encoder, Spec, build, plain
from quire.data import DataModule, check_batch, mix
from quire.errors import ConfigError
from quire.recipe import instantiate
from quire.roles.probes.features import Features, Read

QUICK = 64
"""Samples of each split under ``trainer.fast_dev_run``."""


@dataclass
class Subject:
    """A frozen encoder, the data it is judged on, and where.

    Args:
        encoder: A built encoder.
        source: Data module with the splits.
        device: Where the encoder is.
        model: Its model, for encoders that look at their siblings; None for an encoder alone.
        seed: Seed of subsets, of probes and of the untrained twin.
        rank: This process.
        world: Number of processes; each encodes its share, then all have all.
        quick: Only ``QUICK`` samples a split.
        scope: Precision context around the encoder.
        convert: Precision of a batch.
    """

    encoder: Encoder
    source: DataModule
    device: torch.device
    model: Any = None
    seed: int = 0
    rank: int = 0
    world: int = 1
    quick: bool = False
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    convert: Callable[[Batch], Batch] | None = None

    @classmethod
    def of(cls, trainer: Any, model: Any) -> Subject:
        """The model's encoder in a running trainer."""
        return cls(
            model.encoder,
            trainer.datamodule,
            model.device,
            model,
            model.seed,
            trainer.global_rank,
            trainer.world_size,
            bool(trainer.fast_dev_run),
            trainer.precision_plugin.forward_context,
            trainer.precision_plugin.convert_input,
        )

    def gather(self, mine: Any) -> list[Any]:
        """``mine`` of every rank, in rank order."""
        if self.world == 1:
            return [mine]
        everyone: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(everyone, mine)
        return everyone

    def collect(self, read: Read, split: str, limit: int | None = None) -> Features:
        """Features of a split on every rank, in the split's order.

        Args:
            read: What to keep of a batch that is on the device and transformed as in validation.
            split: ``train``, ``val`` or ``test``.
            limit: At most this many samples, the first of a seeded permutation.
        """
        return Features.join([f for f in self.gather(self._mine(read, split, limit)) if f is not None])

    def _mine(self, read: Read, split: str, limit: int | None) -> Features | None:
        full = self.source.loader(split)
        total = len(full.dataset)  # type: ignore[arg-type]
        limit = min(limit or total, QUICK) if self.quick else limit
        rows = torch.arange(total)
        if limit is not None and limit < total:
            order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))
            rows = order[:limit].sort().values
        chosen = rows[self.rank :: self.world].tolist()
        loader: DataLoader = DataLoader(
            full.dataset, full.batch_size, sampler=chosen, num_workers=full.num_workers, collate_fn=full.collate_fn
        )
        generator = torch.Generator(self.device)
        pieces = []
        with _first_epoch(self.source.dataset(split)):
            for number, batch in enumerate(loader):
                batch = move_data_to_device(batch, self.device)
                if not number:
                    check_batch(batch)
                generator.manual_seed(mix(self.seed, number, self.rank))
                batch = self.source.transform(batch, generator, training=False)
                if self.convert is not None:
                    batch = self.convert(batch)
                with self.scope():
                    values, mask = read(batch)
                label = batch.get("label")
                pieces.append(
                    Features(
                        values.detach().float().cpu(),
                        batch["index"].cpu(),
                        None if mask is None else mask.cpu(),
                        None if label is None else label.cpu(),
                    )
                )
        return Features.join(pieces) if pieces else None

    def untrained(self) -> Encoder:
        """The same encoder with the weights of a fresh start, built for the same data.

        Raises:
            ConfigError: an encoder that can't be made from its own arguments.
        """
        torch.manual_seed(mix(self.seed, 2))
        made: Encoder = instantiate(_without_weights(plain(self.encoder)))
        build(made, Spec(self.encoder.__dict__["built_with"]))
        if self.model is not None:
            made.bind(self.model)
        kinds = {p.dtype for p in self.encoder.parameters() if p.is_floating_point()}
        made.to(self.device, kinds.pop() if len(kinds) == 1 else None)
        return made.eval().requires_grad_(False)


def _without_weights(what: Any) -> Any:
    """Arguments named ``pretrained`` switched off, at every depth, so the twin fetches no weights."""
    if isinstance(what, dict):
        loads = {k for k, v in what.items() if k == "pretrained" and (v is True or isinstance(v, str))}
        return {k: False if k in loads else _without_weights(v) for k, v in what.items()}
    return [_without_weights(w) for w in what] if isinstance(what, list) else what


@contextmanager
def _first_epoch(data: Any) -> Iterator[None]:
    """Draw a data set's random cuts as in epoch 0, then give the training loop its epoch back."""
    before = getattr(data, "epoch", None)
    if before is not None:
        data.epoch = 0
    try:
        yield
    finally:
        if before is not None:
            data.epoch = before


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Everything in eval mode and without gradients inside; every mode and random stream as before after it."""
    modes = [(module, module.training) for module in model.modules()]
    with (
        isolate_rng(include_cuda=False),
        torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=device.type == "cuda"),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def check_reads(encoder: Encoder, offered: tuple[str, ...], source: str, also: tuple[str, ...], asker: object) -> None:
    """Raise ``ConfigError`` when the encoder, or ``asker``, reads a field that the data doesn't offer."""
    parts = [(type(m).__name__, m.fields) for m in encoder.modules() if isinstance(m, Component)]
    for name, fields in [(type(asker).__name__, also), *parts]:
        for wanted in fields:
            if not any(field in offered for field in wanted.split("|")):
                either = wanted.replace("|", " or ")
                raise ConfigError(f"{name} reads the field {either}; {source} offers {', '.join(offered) or 'none'}")
