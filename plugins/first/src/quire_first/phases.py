"""When the backbone trains and when the routers do, how hard they are pressed, and what they say."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from quire.errors import ConfigError
from quire_first.model import RoutedModel, tiny_routed
from quire_first.objective import RouterTraining

ENDS = {"soft": 0.1, "gumbel": 0.3}
"""The gates' last temperature; both start at 1."""


class RouterPhases(Callback):
    """Trains the backbone first where asked, raises alpha, lowers the gates' temperature, logs each layer's rho.

    Phases after Jain et al. 2024; schedules are ours. ``RouterTraining`` works without it, on a backbone frozen from
    the start at full alpha.

    Args:
        backbone: Share of the steps, in [0, 1), in which the backbone alone trains with every layer; then it freezes.
        warmup: Share of the routers' steps over which alpha rises from 0, in [0, 1].
        temperature: First and last temperature of the gates ``soft`` and ``gumbel``; default 1 to 0.1 and 1 to 0.3.
        log: Log ``rho/LAYER`` on logging steps.

    Raises:
        ConfigError: a share out of range, a temperature not above 0, no RouterTraining or RoutedModel.
    """

    decoder: RoutedModel

    def __init__(
        self,
        backbone: float = 0.0,
        warmup: float = 0.0,
        temperature: list[float] | None = None,
        log: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= backbone < 1 or not 0 <= warmup <= 1:
            raise ConfigError(
                f"RouterPhases needs backbone in [0, 1) and warmup in [0, 1], got {backbone} and {warmup}"
            )
        if temperature is not None and (len(temperature) != 2 or min(temperature) <= 0):
            raise ConfigError(f"RouterPhases.temperature is two numbers above 0, first and last; got {temperature}")
        self.backbone, self.warmup, self.temperature, self.log = backbone, warmup, temperature, log

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """The backbone first, on digit strings."""
        run = tiny_routed({"class_path": "RouterTraining"})
        callback = {"class_path": "RouterPhases", "init_args": {"backbone": 0.5, "warmup": 0.5}}
        return {**run, "trainer": {"callbacks": [callback]}}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask the objective to leave the backbone its gradients."""
        if stage != "fit":
            return
        objective = self._objective(pl_module)
        if objective is None:
            raise ConfigError("RouterPhases needs model.objective with RouterTraining and a RoutedModel")
        objective.keeps_backbone = self.backbone > 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set what trains, alpha and temperature by the step alone, so a resumed run goes on as it would have."""
        objective, decoder = self._objective(pl_module), self._decoder(pl_module)
        assert objective is not None
        done = trainer.global_step / max(1.0, float(trainer.estimated_stepping_batches))
        first = done < self.backbone
        stage = "backbone" if first else "routers"
        if self.backbone > 0 and (stage != objective.stage or batch_idx == 0):
            decoder.trains(backbone=first, routers=not first, adapters=False)
            encoder: Any = pl_module.encoder
            if encoder is not None:
                encoder.requires_grad_(first)
        objective.stage = stage
        into = max(0.0, (done - self.backbone) / (1 - self.backbone))
        objective.weights["skip"] = objective.alpha * (min(1.0, into / self.warmup) if self.warmup else 1.0)
        begin, end = self.temperature or (1.0, ENDS.get(decoder.gate, 1.0))
        decoder.routers.temperature = begin * (end / begin) ** min(1.0, into)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log each layer's mean probability."""
        routing = (outputs or {}).get("outputs", {}).get("routing") if isinstance(outputs, dict) else None
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.log and routing is not None and trainer.global_step % every == 0:
            means = routing.rho.detach().mean(0)
            pl_module.log_dict({f"rho/{i}": means[i] for i in range(len(means))}, batch_size=len(routing.rho))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation and test after the run see the routers."""
        objective = self._objective(pl_module)
        if objective is not None:
            objective.stage = "routers"

    def _objective(self, module: Any) -> RouterTraining | None:
        return None if module.objective is None else module.objective.role(RouterTraining)

    def _decoder(self, module: Any) -> RoutedModel:
        return module.decoder.role(RoutedModel)
