"""What runs beside phase 2: warnings, the cache of lookups, and how keys are used. After Träuble et al. 2023."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from quire_dkvb.encoder import KeyValueBottleneck
from quire_dkvb.stream import whole

log = logging.getLogger(__name__)


class BesideBottleneck(Callback):
    """``KeyValueBottleneck`` brings it along: it logs ``keys_used`` and ``key_perplexity`` after each epoch."""

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        """No key has been used yet, and that is no mistake."""
        _of(pl_module).checking = True

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        """From here on it would be one."""
        _of(pl_module).checking = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Warn of optimizers that move more than what was fetched; open the cache."""
        bottleneck = _of(pl_module)
        if not bottleneck.values.requires_grad:
            return
        for said in moving(trainer.optimizers, bottleneck.values):
            rank_zero_warn(f"{said}: values outside the batch will move: use SGD without momentum and weight decay")
        reason = uncached(bottleneck, pl_module.datamodule)
        if reason:
            log.info("lookups are not cached: %s", reason)
        else:
            bottleneck.remember(len(whole(pl_module.datamodule, "train")))  # type: ignore[arg-type]

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """All processes exclude the same keys."""
        _of(pl_module).gather()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """The first process writes what all have counted; the next checkpoint has it if this one came too early."""
        _of(pl_module).settle()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """How many keys are in use."""
        bottleneck = _of(pl_module)
        bottleneck.gather()
        if trainer.logger is not None and bottleneck.values.requires_grad:
            found = {"train/keys_used": used(bottleneck.usage), "train/key_perplexity": perplexity(bottleneck.usage)}
            pl_module.log_dict(found, on_epoch=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The next run may have other data."""
        _of(pl_module).remember(None)


def _of(model: Any) -> KeyValueBottleneck:
    return model.find(KeyValueBottleneck)


def moving(optimizers: list[Any], values: Tensor) -> list[str]:
    """What an optimizer has that moves values without a gradient; one phrase each."""
    said = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if not any(p is values for p in group["params"]):
                continue
            if not isinstance(optimizer, torch.optim.SGD):
                said.append(f"the optimizer is {type(optimizer).__name__}")
            said += [f"the optimizer has {k} {group[k]:g}" for k in ("momentum", "weight_decay") if group.get(k)]
    return said


def uncached(bottleneck: KeyValueBottleneck, source: Any) -> str:
    """Why lookups can't be kept; empty if they can."""
    if not bottleneck.cache:
        return "KeyValueBottleneck.cache is off"
    if source is None:
        return "there is no data module that numbers the samples"
    if source.transforms:
        return "data.transforms may change the training images, so each step looks up anew"
    try:
        data = source.dataset("train")
    except NotImplementedError:
        return f"{type(source).__name__} has no fixed training samples"
    while data is not None:
        if getattr(data, "fresh", False):
            return "training samples are cut at random, so each step looks up anew"
        data = getattr(data, "dataset", None)  # a Subset's
    return ""


def used(usage: Tensor) -> Tensor:
    """Share of keys that were fetched at all."""
    return (usage > 0).float().mean()


def perplexity(usage: Tensor) -> Tensor:
    """exp of the entropy of how often a codebook's keys were fetched, mean over codebooks; M when all are alike."""
    share = usage.double() / usage.sum(1, keepdim=True).clamp(min=1)
    return torch.special.entr(share).sum(1).exp().mean().float()
