"""What is kept and what is lost over a stream of classes, and how keys are used. After Träuble et al. 2023."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.contracts import Batch, Losses, Metric, Spec
from quire.errors import ConfigError
from quire.model import Model
from quire_dkvb.encoder import KeyValueBottleneck, tiny_run
from quire_dkvb.watching import perplexity, used


def _tiny(name: str) -> dict[str, Any]:
    base = {"class_path": "Digits", "init_args": {"train_samples": 256}}
    data = {"class_path": "ClassIncremental", "init_args": {"base": base, "epochs_per_split": 1}}
    return {**tiny_run(metrics=[name]), "data": data, "trainer": {"max_epochs": 5}}


class FinalAccuracy(Metric):
    """Mean over all classes of the accuracy on each, after whatever was trained last. Träuble et al. 2023.

    Returns:
        A scalar in [0, 1]; classes without a sample don't count.
    """

    higher_is_better: bool | None = True
    full_state_update = False
    right: Tensor
    total: Tensor

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Over a stream of digits."""
        return _tiny(cls.__name__)

    def build(self, spec: Spec) -> None:
        """A count a class."""
        self.classes = int(spec.need("classes", self))
        for name in ("right", "total"):
            self.add_state(name, torch.zeros(self.classes), dist_reduce_fx="sum")

    def observe(self, model: Model, batch: Batch, losses: Losses) -> None:
        """Count one batch.

        Raises:
            ConfigError: an objective that hands out no logits.
        """
        logits = losses.outputs.get("logits")
        if logits is None:
            name = type(model.objective).__name__
            raise ConfigError(f"{type(self).__name__} reads logits, which {name} doesn't hand out: use Classify")
        self.update(logits, batch["label"])

    def update(self, logits: Tensor, label: Tensor) -> None:
        """Count ``logits`` [B,K] against ``label`` [B]."""
        hit = (logits.argmax(1) == label).to(self.right.dtype)
        self.right.index_add_(0, label, hit)
        self.total.index_add_(0, label, torch.ones_like(hit))

    def by_class(self) -> Tensor:
        """[K], NaN where there is no sample."""
        return self.right / self.total

    def compute(self) -> Tensor:
        """The mean."""
        return self.by_class().nanmean()


class _OverStream(FinalAccuracy):
    """What is read off a_st, the accuracy on split t's classes after split s was trained.

    ``history`` [S,T] is a_st, NaN where nothing was measured yet; it is kept with the checkpoint. Several evaluations
    within a split overwrite each other; one outside ``fit`` overwrites the last.
    """

    history: Tensor

    def build(self, spec: Spec) -> None:
        """Room for the history.

        Raises:
            ConfigError: data that aren't a stream of classes.
        """
        super().build(spec)
        if not spec.get("tasks"):
            raise ConfigError(f"{type(self).__name__} needs a stream of classes: wrap data in ClassIncremental")
        self.tasks = [torch.tensor(task) for task in spec["tasks"]]
        self.row: int | None = None
        self.register_buffer("history", torch.full((len(self.tasks),) * 2, torch.nan))

    def observe(self, model: Model, batch: Batch, losses: Losses) -> None:
        """Count one batch of an evaluation after the current split."""
        super().observe(model, batch, losses)
        trainer, stream = model._trainer, model.datamodule
        self.row = None
        if trainer is not None and trainer.state.fn == "fit" and hasattr(stream, "current"):
            self.row = stream.current(trainer.current_epoch)

    def compute(self) -> Tensor:
        """Write the row, read the number."""
        by_class = self.by_class()
        known = (~self.history.isnan()).any(1).nonzero()
        row = self.row if self.row is not None else int(known.max()) if len(known) else len(self.tasks) - 1
        self.history[row:] = torch.nan  # a run that starts anew forgets what an older one measured
        self.history[row] = torch.stack([by_class[task.to(by_class.device)].nanmean() for task in self.tasks])
        found = self.read(self.history[: row + 1])
        return found.nan_to_num(0.0)

    def read(self, history: Tensor) -> Tensor:
        """The number of a_st [s,T], s splits trained so far."""
        raise NotImplementedError


def _earlier(history: Tensor) -> tuple[Tensor, Tensor]:
    """(a_st over all s [s,t], a of the last row [t]) of the tasks before the last one trained."""
    before = len(history) - 1
    return history[:, :before], history[-1, :before]


class Forgetting(_OverStream):
    """Best accuracy a split ever had minus what it has now, mean over the splits before the current one.

    Chaudhry et al. 2018, arXiv 1801.10112: mean over t of max_s a_st minus a_Tt, at least 0.

    Returns:
        A scalar in [0, 1]; 0 while there is one split only.

    Raises:
        ConfigError: data that aren't a stream of classes.
    """

    higher_is_better = False

    def read(self, history: Tensor) -> Tensor:
        """max minus last."""
        every, last = _earlier(history)
        best = every.nan_to_num(0.0).amax(0) if every.shape[1] else last
        return (best - last).nanmean()


class FirstMinusLast(_OverStream):
    """Accuracy of a split right after it was trained minus what it has now: avalanche's Forgetting. Ours by name.

    Unlike Forgetting (Chaudhry et al. 2018) it can be negative, and doesn't see a peak in between.

    Returns:
        A scalar in [-1, 1]; 0 while there is one split only.

    Raises:
        ConfigError: data that aren't a stream of classes.
    """

    higher_is_better = False

    def read(self, history: Tensor) -> Tensor:
        """a_tt minus a_Tt."""
        every, last = _earlier(history)
        return (every.diagonal() - last).nanmean()


class BackwardTransfer(_OverStream):
    """What later splits did to earlier ones: a_Tt minus a_tt, mean over t < T. Lopez-Paz and Ranzato 2017.

    Returns:
        A scalar in [-1, 1]; negative is forgetting.

    Raises:
        ConfigError: data that aren't a stream of classes.
    """

    higher_is_better = True

    def read(self, history: Tensor) -> Tensor:
        """a_Tt minus a_tt."""
        every, last = _earlier(history)
        return (last - every.diagonal()).nanmean()


class _OfKeys(Metric):
    """A number that is the same for every batch of an evaluation: taken at the first one."""

    encoder: KeyValueBottleneck
    higher_is_better: bool | None = None
    full_state_update = False
    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("value", torch.tensor(0.0), dist_reduce_fx="mean")  # equal on all processes

    def measure(self, usage: Tensor) -> Tensor:
        """The number, of how often each key [C,M] was fetched."""
        raise NotImplementedError

    def observe(self, model: Model, batch: Batch, losses: Losses) -> None:
        """Measure at the first batch."""
        if not self.update_called:
            bottleneck: Any = model.find(KeyValueBottleneck)
            bottleneck.settle()
            self.update(self.measure(bottleneck.usage))

    def update(self, value: Tensor) -> None:
        """Keep ``value``."""
        self.value = value.detach().to(self.value)

    def compute(self) -> Tensor:
        """What was measured."""
        return self.value


class KeyUtilisation(_OfKeys):
    """Share of all keys that training has fetched. After Träuble et al. 2023, who exclude the others.

    Returns:
        A scalar in [0, 1].
    """

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Over a stream of digits."""
        return _tiny("KeyUtilisation")

    def measure(self, usage: Tensor) -> Tensor:
        """Count them."""
        return used(usage)


class KeyPerplexity(_OfKeys):
    """How many keys of a codebook are in use, as exp of the entropy of their use, mean. After Träuble et al. 2023.

    Returns:
        A scalar from 1 to M, the number of keys; 0 before training.
    """

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Over a stream of digits."""
        return _tiny("KeyPerplexity")

    def measure(self, usage: Tensor) -> Tensor:
        """exp of the entropy."""
        return perplexity(usage) if bool(usage.any()) else torch.tensor(0.0)
