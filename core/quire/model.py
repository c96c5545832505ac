"""The one LightningModule: builds the parts, runs the objective, optimises, predicts."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from quire import checkpoint, optimizers, recipe
from quire.contracts import (
    SLOTS,
    Batch,
    Component,
    Decoder,
    Encoder,
    Losses,
    Metric,
    Objective,
    Role,
    Sampler,
    Spec,
    build,
)
from quire.data import check_batch, mix
from quire.errors import ConfigError, DataError
from quire.matching import check_fields, check_model
from quire.schedule import Schedule


class Model(LightningModule):
    """Encoder, decoder, objective and sampler in one training loop. Every part is optional where it isn't needed.

    Args:
        encoder: batch → codes.
        decoder: codes → data space; a language model alone is a decoder.
        objective: What ``fit``, ``validate`` and ``test`` compute.
        sampler: What ``predict`` draws; without one ``predict`` returns the encoder's codes.
        metrics: Metrics of ``validate`` and ``test``.
        optimizer: Default AdamW, learning rate 1e-3, weight decay 0.05 (none on norms, biases and scalars). With
            several players one for all, or one by player name.
        schedule: Default warm-up over 5 % of the steps, then cosine to 0; by player name too.
        spec: Sizes of the data; linked to ``data.spec`` by the command line, else taken from the data module.

    Raises:
        ConfigError: parts that can't work together, in one sentence, before anything is built.
    """

    def __init__(
        self,
        encoder: Encoder | None = None,
        decoder: Decoder | None = None,
        objective: Objective | None = None,
        sampler: Sampler | None = None,
        metrics: list[Metric] | None = None,
        optimizer: OptimizerCallable | dict[str, OptimizerCallable] | None = None,
        schedule: Schedule | dict[str, Schedule] | None = None,
        spec: Spec | dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        make = recipe.instantiate
        self.encoder: Any = make(encoder)
        self.decoder: Any = make(decoder)
        self.objective: Any = make(objective)
        self.sampler: Any = make(sampler)
        self.metrics = nn.ModuleList([make(m) for m in metrics or []])
        self.schedule: Any = optimizers.schedule_from(schedule)
        self.optimizer: Any = optimizers.optimizer_from(optimizer)
        self.spec = Spec(spec) if spec else None
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        self.refer_tokenizer(None)
        self.automatic_optimization = not self._players
        self._ready = False
        self._generators: dict[torch.device, torch.Generator] = {}
        self._key = mix(self.seed)
        self._sums: dict[str, Any] = {}
        self._count = 0
        check_model(self)
        self.save_hyperparameters(checkpoint.describe(self))

    def refer_tokenizer(self, tokenizer: Any) -> None:
        """Keep the data's tokenizer: saved in the checkpoint, so a loaded language model can read and write text."""
        object.__setattr__(self, "tokenizer", tokenizer)

    @property
    def datamodule(self) -> Any:
        """The run's data module; None outside a run."""
        return getattr(self._trainer, "datamodule", None)

    @property
    def subject(self) -> Any:
        """The frozen model under study, which belongs to the data module; None without one."""
        return getattr(self.datamodule, "subject", None)

    # ---- parts
    def components(self) -> Iterator[Component]:
        """Every component in the model, parts of parts included."""
        return (m for m in self.modules() if isinstance(m, Component))

    def find(self, role: type[Role]) -> Role | None:
        """The first of encoder, decoder, objective, sampler that has ``role``."""
        for slot in SLOTS:
            part = getattr(self, slot)
            if part is not None and (found := part.role(role)) is not None:
                return found
        return None

    def configure_model(self) -> None:
        """Build what depends on the data, once, then introduce the parts to each other."""
        if self._ready:
            return
        if self._device_mesh is not None:  # ModelParallelStrategy
            from quire.sharding import build_sharded

            build_sharded(self, self._build, self._device_mesh)
        else:
            self._build()
        self._ready = True

    def _build(self) -> None:
        source = self.datamodule
        if self.spec is None:
            self.spec = Spec(source.spec) if source is not None and hasattr(source, "spec") else Spec()
        spec = Spec(self.spec)
        for slot in SLOTS:
            part = getattr(self, slot)
            if part is None:
                continue
            build(part, spec)
            if slot == "encoder":
                spec = Spec({**spec, "codes": part.sizes()})
        for part in (*self.metrics, *self.schedule.modules()):
            if isinstance(part, Component):
                build(part, spec)
        if self.sampler is not None:
            self.sampler.requires_grad_(False)  # it draws; what it holds (a smaller model) is trained elsewhere
        for part in (*(getattr(self, slot) for slot in SLOTS), *self.metrics):
            if part is not None:
                part.bind(self)

    def setup(self, stage: str) -> None:
        """Check that the stage has what it needs and that the data offers the fields that are read."""
        stage = str(getattr(stage, "value", stage))
        if stage == "predict" and self.sampler is None and self.encoder is None:
            raise ConfigError("predict needs model.sampler or model.encoder")
        if stage != "predict" and self.objective is None:
            raise ConfigError(f"{stage} needs model.objective")
        source = self.datamodule
        if getattr(source, "tokenizer", None) is not None:
            self.refer_tokenizer(source.tokenizer)
        if source is not None and getattr(source, "fields", None):
            check_fields(self, _offered(source), type(source).__name__, stage)
        self._checked: set[str] = set()

    def configure_callbacks(self) -> list[Any]:
        """Callbacks that the parts bring along; where the user lists one of the same class, that one stands."""
        listed = {type(c) for c in getattr(self._trainer, "callbacks", []) if not hasattr(c, "brought_by")}
        found = []
        for part in self.components():
            for callback in part.callbacks():
                if type(callback) not in listed:
                    callback.brought_by = type(part).__name__  # type: ignore[attr-defined]
                    found.append(callback)
        return found

    # ---- steps
    def forward(self, batch: Batch) -> Any:
        """batch → codes."""
        return self.encoder(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """The objective's terms, weighted and summed; or one step of each player.

        Callbacks find the objective's ``outputs`` in ``on_train_batch_end``.
        """
        self._rekey("train", self.current_epoch, batch_idx)
        batch = self._prepare(batch, "train")
        if self._players:
            return {"outputs": self._play(batch).outputs}
        losses = self.objective(self, batch)
        loss = self._total(losses)
        if not loss.requires_grad:
            name = type(self.objective).__name__
            raise ConfigError(f"{name}: all that its loss depends on is frozen; give it a part with freeze: false")
        self._note(losses, loss, batch)
        return {"loss": loss, "outputs": losses.outputs}

    def _play(self, batch: Batch) -> Losses:
        moving, schedulers = self.optimizers(), self.lr_schedulers()
        together, total = Losses({}), torch.zeros((), device=self.device)
        for i, player in enumerate(self._players):
            optimizer = moving[i]  # type: ignore[index]
            if i:  # the first player alone advances global_step
                optimizer._on_before_step = optimizer._on_after_step = _nothing
            self.toggle_optimizer(optimizer)
            losses = self.objective(self, batch, player=player)
            loss = self._total(losses)
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)
            schedulers[i].step()  # type: ignore[index]
            together.update(losses)
            together.metrics.update(losses.metrics)
            together.outputs.update(losses.outputs)
            total = total + loss.detach()
        self._note(together, total, batch)
        return together

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Terms and metrics over the validation split; the draws are the same in every epoch."""
        self._evaluate("val", batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Terms and metrics over the test split."""
        self._evaluate("test", batch, batch_idx)

    def _evaluate(self, stage: str, batch: Batch, batch_idx: int) -> None:
        self._rekey(stage, 0, batch_idx)
        batch = self._prepare(batch, stage)
        players = {"player": self._players[0]} if self._players else {}
        losses = self.objective(self, batch, **players)
        values = {**losses, "loss": self._total(losses), **_evaluated(losses.metrics)}
        size = _batch_size(batch)
        self.log_dict({f"{stage}/{k}": v for k, v in values.items()}, batch_size=size, sync_dist=True, on_epoch=True)
        for metric in self.metrics:
            assert isinstance(metric, Metric)
            if type(metric).observe is Metric.observe:  # it looks at what predict gives
                continue
            metric.observe(self, batch, losses)
            name = getattr(metric, "label", type(metric).__name__)
            self.log(f"{stage}/{name}", metric, batch_size=size, on_epoch=True)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """The sampler's results, or the encoder's codes."""
        self._rekey("predict", 0, batch_idx)
        if self.sampler is None:
            return self.encoder(self._prepare(batch, "predict"))
        if self.sampler.needs_grad:  # tensors born in inference mode can't be differentiated
            with torch.inference_mode(False), torch.enable_grad():
                batch = {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()}
                batch = self._prepare(batch, "predict")
                results = self.sampler(self, batch)
        else:
            batch = self._prepare(batch, "predict")
            results = self.sampler(self, batch)
        for metric in self.metrics:
            assert isinstance(metric, Metric)
            metric.sampled(self, batch, results)
        return results

    @property
    def _players(self) -> tuple[str, ...]:
        return () if self.objective is None else tuple(self.objective.players)

    def _prepare(self, batch: Batch, stage: str) -> Batch:
        if stage not in self._checked:
            self._checked.add(stage)
            check_batch(batch)
        source = self.datamodule
        if source is not None and getattr(source, "transforms", None):
            batch = source.transform(batch, self.generator(), training=stage == "train")
        return batch

    def _total(self, losses: Losses) -> Tensor:
        weights = self.objective.weights
        terms = [v if (w := weights.get(k, 1.0)) == 1.0 else w * v for k, v in losses.items()]
        if not terms:
            raise ConfigError(f"{type(self.objective).__name__} returned no loss terms")
        return functools.reduce(torch.add, terms)

    # ---- randomness
    def _rekey(self, stage: str, epoch: int, batch_idx: int) -> None:
        # every step has its own seed: what came before (a probe, a validation, a kill) can't change it
        rank = self.global_rank if self._trainer is not None else 0
        self._key = mix(self.seed, ("train", "val", "test", "predict").index(stage), epoch, batch_idx, rank)
        torch.manual_seed(self._key)
        for generator in self._generators.values():
            generator.manual_seed(self._key)

    def generator(self, device: torch.device | str | None = None) -> torch.Generator:
        """The step's generator, seeded by (seed, stage, epoch, batch, rank); one per device."""
        where = torch.device(device) if device is not None else self.device
        if where not in self._generators:
            self._generators[where] = torch.Generator(where).manual_seed(self._key)
        return self._generators[where]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_generators": {}}  # generators can't be copied; they are remade

    # ---- logging
    def _note(self, losses: Losses, loss: Tensor, batch: Batch) -> None:
        step, every = self.trainer.global_step, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        logging = (step + (not self._players)) % every == 0
        if (logging or self.device.type == "cpu") and not math.isfinite(loss.item()):
            self._blame(losses, batch, step)
        for name, value in (*losses.items(), ("loss", loss)):
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()
        self._count += 1
        if logging:
            self._flush(losses, batch)

    def _flush(self, losses: Losses | None, batch: Batch | None) -> None:
        means = {f"train/{k}": v / self._count for k, v in self._sums.items()}
        extra = {f"train/{k}": v for k, v in _evaluated(losses.metrics).items()} if losses else {}
        self._sums, self._count = {}, 0
        size, ends = _batch_size(batch) if batch else 1, losses is None
        self.log_dict({**means, **extra}, on_step=not ends, on_epoch=ends, batch_size=size, sync_dist=True)

    def on_train_epoch_end(self) -> None:
        """Log what an epoch shorter than the logging interval has gathered."""
        if self._count:
            self._flush(None, None)

    def _blame(self, losses: Losses, batch: Batch, step: int) -> None:
        check_batch(batch)
        bad = ", ".join(k for k, v in losses.items() if not math.isfinite(v.item())) or "the sum"
        raise DataError(f"loss term {bad} is not finite at step {step}: lower the learning rate or the term's weight")

    # ---- optimisation
    def configure_optimizers(self) -> Any:
        """One optimizer and schedule a player; weight decay only on matrices; layer-wise decay if asked for."""
        return optimizers.configure(self)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, then let the gradients go: Lightning would keep them through the next forward pass."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    # ---- checkpoints
    def on_save_checkpoint(self, checkpoint_: dict[str, Any]) -> None:
        """Keep how to rebuild the model without YAML, the seed, and what the next log line will average."""
        checkpoint_["hyper_parameters"] = checkpoint.describe(self)
        checkpoint_["quire"] = checkpoint.stamp(self)
        checkpoint_["quire"]["unlogged"] = {"count": self._count, "sums": {k: float(v) for k, v in self._sums.items()}}

    def on_load_checkpoint(self, checkpoint_: dict[str, Any]) -> None:
        """Refuse the checkpoint of another model by name; continue with its seed and what it had yet to log."""
        checkpoint.compare(self, checkpoint_)
        state, ours = checkpoint_.get("state_dict", {}), self.state_dict()
        for name in [n for n in state if n.startswith("objective.") and self.objective is None]:
            del state[name]  # a run that only predicts needs no head of the method
        state.update({n: v for n, v in ours.items() if n not in state and n.startswith(("sampler.", "metrics."))})
        record = checkpoint_["quire"]
        self.seed = record.get("seed", self.seed)
        unlogged = record.get("unlogged", {"count": 0, "sums": {}})
        self._count, self._sums = unlogged["count"], dict(unlogged["sums"])


def _evaluated(metrics: dict[str, Any]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {k: v() if callable(v) else v for k, v in metrics.items()}


def _batch_size(batch: Batch) -> int:
    return next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim), 1)


def _offered(source: Any) -> tuple[str, ...]:
    return source.offered() if hasattr(source, "offered") else tuple(source.fields)


def _nothing(*_: Any) -> None:
    return None
