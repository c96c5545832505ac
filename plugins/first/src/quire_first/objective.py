"""The two phases: routers on a frozen backbone, then adapters under frozen routers. After Jain et al. 2024."""

from __future__ import annotations

import math
import tempfile
from typing import Any

import torch
from torch import Tensor

from quire.contracts import Batch, Losses, Objective, Spec
from quire.errors import ConfigError
from quire.roles.language.contract import codes_of
from quire.roles.language.next_token import score, scored
from quire_first.model import RoutedModel, tiny_routed
from quire_first.routing import Routing

PENALTIES = ("mean", "target")


class _Routed(Objective):
    """What both phases share: the routed pass and its task loss."""

    decoder: RoutedModel

    def check(self, model: Any) -> None:
        """It reads ``prompt_length``, or ``source`` where there is an encoder."""
        sourced = model.encoder is not None or getattr(model.decoder.role(RoutedModel).base, "crosses", False)
        self.refer("fields", ("source", "tokens") if sourced else ("tokens", "prompt_length"))

    def run(self, model: Any, batch: Batch, every_layer: bool = False) -> tuple[Losses, Routing | None]:
        """Task loss in nats, by the routers or with every layer."""
        decoder: RoutedModel = model.decoder.role(RoutedModel)
        tokens, mask = batch["tokens"], batch.get("mask")
        codes = codes_of(model, batch) if decoder.crosses else None
        given, seen = tokens[:, :-1], None if mask is None else mask[:, :-1]
        routing = None
        if every_layer:
            logits = decoder(codes, given, seen)
        else:
            length = None if decoder.crosses else batch["prompt_length"]
            logits, routing = decoder.routed(codes, given, seen, length)
        losses = score(logits, tokens, scored(batch, decoder.crosses), 0.0, False, "task")
        if routing is not None:
            losses.outputs["routing"] = routing
            losses.metrics["skip_rate"] = lambda: routing.skip_rate
        return losses, routing


class RouterTraining(_Routed):
    """Phase 1: routers learn which layers a prompt needs, all else frozen. After FiRST (reconstruction).

    Jain, Sharma, Mukherjee, Pal, 2024, arXiv 2410.12513.

    Args:
        alpha: Weight of the penalty on running layers; larger skips more.
        decay: Weight of the routers' squared size.
        penalty: ``mean``: mean probability to run; ``target``: its distance from 1 - ``target_skip``.
        target_skip: Share of all layers to skip with ``target``, in [0, 1).
        polarise: Weight of mean rho(1 - rho), which drives probabilities from the threshold.

    Needs:
        decoder: RoutedModel. Batch fields tokens [B,T], mask [B,T] and prompt_length [B], or a source.

    Returns:
        ``task``: cross-entropy of target tokens, in nats; ``skip``: the penalty, in [0, 1]; ``size``: squared weights;
        ``polar``: in [0, 1/4].

    Raises:
        ConfigError: an argument out of range, a target that protected layers rule out.
    """

    keeps_backbone = False  # RouterPhases(backbone=…) trains it first
    stage = "routers"
    weights: dict[str, float]

    def __init__(
        self,
        alpha: float = 0.3,
        decay: float = 0.01,
        penalty: str = "mean",
        target_skip: float | None = None,
        polarise: float = 0.0,
    ) -> None:
        super().__init__()
        if min(alpha, decay, polarise) < 0:
            raise ConfigError(f"RouterTraining needs weights of at least 0, got {alpha}, {decay} and {polarise}")
        if penalty not in PENALTIES:
            raise ConfigError(f"RouterTraining.penalty is mean or target, got {penalty!r}")
        if (penalty == "target") != (target_skip is not None):
            raise ConfigError("RouterTraining: penalty target and target_skip go together: give both or neither")
        if target_skip is not None and not 0 <= target_skip < 1:
            raise ConfigError(f"RouterTraining.target_skip must be in [0, 1), got {target_skip}")
        self.alpha, self.decay, self.penalty, self.target, self.polarise = alpha, decay, penalty, target_skip, polarise
        self.weights = {"skip": alpha, "size": decay, "polar": polarise}

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small language model on digit strings."""
        return tiny_routed({"class_path": "RouterTraining"})

    def bind(self, model: Any) -> None:
        """Freeze everything but the routers."""
        super().bind(model)
        decoder: RoutedModel = model.decoder.role(RoutedModel)
        if decoder.force is not None:
            raise ConfigError("RouterTraining trains routers, which force overrides: set RoutedModel.force to null")
        if self.target is not None:
            allowed = math.ceil(decoder.depth * (1 - self.target) - 1e-9)
            if allowed < len(decoder.kept):
                layers = "layer" if allowed == 1 else "layers"
                raise ConfigError(
                    f"target_skip {self.target:g} needs <= {allowed} active {layers} "
                    f"but {len(decoder.kept)} are protected"
                )
        decoder.trains(backbone=self.keeps_backbone, routers=True, adapters=False)
        if model.encoder is not None:
            model.encoder.requires_grad_(self.keeps_backbone)

    def forward(self, model: Any, batch: Batch) -> Losses:
        """Task loss under the gates, and the price of running layers."""
        if self.stage == "backbone":
            return self.run(model, batch, every_layer=True)[0]
        losses, routing = self.run(model, batch)
        assert routing is not None
        routers = model.decoder.role(RoutedModel).routers
        if self.training and torch.is_grad_enabled():
            routers.steps += 1
        losses["skip"] = self.price(routing.rho)
        losses["size"] = routers.size()
        if self.polarise:
            losses["polar"] = (routing.rho * (1 - routing.rho)).mean()
        losses.metrics["rho"] = lambda: routing.rho.mean()
        return losses

    def price(self, rho: Tensor) -> Tensor:
        """The penalty on probabilities [B,N] before its weight."""
        if self.target is None:
            return rho.mean(1).mean()
        return (rho.mean() - (1 - self.target)).abs()


class RoutedLoRA(_Routed):
    """Phase 2: adapters make up for what is skipped, the routers frozen and hard. After FiRST (reconstruction).

    Jain, Sharma, Mukherjee, Pal, 2024, arXiv 2410.12513. Routing is as in decoding. Adapters are LoRA:
    W x + (lora_alpha/rank) B A x, B = 0 at first; in evaluation they are
    one product with W.

    Args:
        rank: Of each adapter.
        lora_alpha: Adapters count lora_alpha/rank.
        modules: Projections to adapt: ``q``, ``k``, ``v``, ``o``, ``mlp``, or the model's own names.
        dropout: On what adapters read, in [0, 1).

    Needs:
        decoder: RoutedModel whose routers were trained, ``Pretrained`` of phase 1 as a rule, or with ``force``.

    Returns:
        ``task``: cross-entropy of target tokens under the routing, in nats.

    Raises:
        ConfigError: an argument out of range, a projection that no layer has, untrained routers.
    """

    def __init__(
        self, rank: int = 8, lora_alpha: float = 16.0, modules: list[str] | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.how = {
            "rank": rank,
            "alpha": float(lora_alpha),
            "modules": ["q", "k", "v", "o"] if modules is None else list(modules),
            "dropout": dropout,
        }
        if rank < 1 or lora_alpha <= 0 or not 0 <= dropout < 1:
            raise ConfigError(
                f"RoutedLoRA needs rank >= 1, lora_alpha > 0 and dropout in [0, 1); got {rank}, {lora_alpha}, {dropout}"
            )

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Behind a first phase that is as short as can be."""
        from quire.checkpoint import export
        from quire.model import Model
        from quire.recipe import instantiate

        run = tiny_routed({"class_path": "RoutedLoRA", "init_args": {"rank": 2}})
        data = {"vocab_size": 20, "length": 11, "pad": 0, "bos": 1, "eos": 2, "mask_id": 3}
        first = Model(decoder=instantiate(run["model"]["decoder"]), spec=Spec(data))
        first.configure_model()
        first.decoder.routers.steps += 1
        how = {"path": str(export(first, tempfile.mkdtemp())), "part": "decoder", "freeze": False}
        run["model"]["decoder"] = {"class_path": "Pretrained", "init_args": how}
        return run

    def bind(self, model: Any) -> None:
        """Put the adapters in and freeze all else."""
        super().bind(model)
        decoder: RoutedModel = model.decoder.role(RoutedModel)
        decoder.adapt(**self.how)
        decoder.trains(backbone=False, routers=False, adapters=True)
        if model.encoder is not None:
            model.encoder.requires_grad_(False)

    def forward(self, model: Any, batch: Batch) -> Losses:
        """Task loss under the routing."""
        decoder: RoutedModel = model.decoder.role(RoutedModel)
        if decoder.force is None and self.training and not int(decoder.routers.steps):
            raise ConfigError(
                "RoutedLoRA: routers are untrained: train RouterTraining first, then give its checkpoint as "
                "decoder: {class_path: Pretrained, init_args: {path: …, part: decoder, freeze: false}}"
            )
        return self.run(model, batch)[0]
