"""What the arms of the claim share: one backbone, its trained routers, and prompts held out."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor

from quire.contracts import Spec, build
from quire.datasets.algorithmic import FIRST, Algorithmic
from quire.model import Model
from quire.reproduce import arm_trainer, quiet
from quire.roles.language.models import CausalLM
from quire.roles.language.next_token import NextToken
from quire_first.model import RoutedModel
from quire_first.objective import RoutedLoRA, RouterTraining
from quire_first.phases import RouterPhases

SKIP, SKIPS, DEPTH = 0.25, 2, 8
# "rate" is the backbone's, in 1e-4
FULL = {
    "rate": 15,
    "width": 192,
    "heads": 6,
    "length": 6,
    "batch": 64,
    "backbone": 600,
    "routers": 200,
    "adapters": 200,
}
QUICK = {"rate": 20, "width": 48, "heads": 4, "length": 3, "batch": 16, "backbone": 30, "routers": 10, "adapters": 5}


@dataclass
class Validation:
    """Held-out rows, unpadded sides and all.

    Attributes:
        tokens: [B,T].
        mask: [B,T].
        prompt_length: [B].
        task: [B], the task's token.
    """

    tokens: Tensor
    mask: Tensor
    prompt_length: Tensor
    task: Tensor


@dataclass
class Trial:
    """One seed's."""

    sizes: dict[str, int]
    spec: Spec
    state: dict[str, Tensor]
    threshold: float
    favourites: list[int]
    free: list[int]
    held: Validation
    prompts: list[list[int]]
    new_tokens: int
    seed: int


@functools.lru_cache(maxsize=3)
def trained(seed: int, quick: bool) -> Trial:
    """Backbone with every layer, then routers on it; their threshold is set so that they skip a quarter."""
    sizes = QUICK if quick else FULL
    with quiet():
        seed_everything(seed, verbose=False)
        data = _data(sizes)
        decoder = RoutedModel(_base(sizes))
        _fit(decoder, NextToken(), sizes["backbone"], sizes["rate"] / 1e4, data)
        routing = RouterTraining(alpha=4.0, decay=1e-4, penalty="target", target_skip=SKIP, polarise=1.0)
        _fit(decoder, routing, sizes["routers"], 1e-2, data, RouterPhases(warmup=0.2, log=False))
    decoder.eval()
    held = _held(data)
    decoder.routers.threshold = threshold = _threshold(decoder, held)
    with torch.no_grad():
        _, found = decoder.routed(None, held.tokens, held.mask, held.prompt_length)
    free = list(decoder.routers.place)
    often = (~found.on).float().mean(0)
    favourites = sorted(sorted(free, key=lambda i: -float(often[i]))[:SKIPS])
    state = {k: v.clone() for k, v in decoder.state_dict().items()}
    rows = range(4 if quick else 24)
    prompts = [held.tokens[i, : int(held.prompt_length[i])].tolist() for i in rows]
    return Trial(sizes, Spec(data.spec), state, threshold, favourites, free, held, prompts, 8 if quick else 32, seed)


def wrapped(trial: Trial, force: list[int] | None) -> Model:
    """The trained model, routed or with layers forced away; a copy of its own."""
    decoder = RoutedModel(_base(trial.sizes), threshold=trial.threshold, force=force)
    build(decoder, trial.spec)
    decoder.load_state_dict(trial.state)
    return Model(decoder=decoder, spec=trial.spec)


def adapted(model: Model, trial: Trial) -> Model:
    """With adapters, tuned under its routing."""
    with quiet():
        seed_everything(trial.seed, verbose=False)
        objective = RoutedLoRA(rank=8, lora_alpha=16, modules=["q", "k", "v", "o", "mlp"])
        return _fit(model.decoder, objective, trial.sizes["adapters"], 2e-3, _data(trial.sizes))


def _base(sizes: dict[str, int]) -> CausalLM:
    return CausalLM(width=sizes["width"], depth=DEPTH, heads=sizes["heads"])


def _data(sizes: dict[str, int]) -> Algorithmic:
    length = sizes["length"]
    return Algorithmic("copy+reverse+sort", length, length, samples=16384, causal=True, batch_size=sizes["batch"])


def _fit(decoder: RoutedModel, objective: Any, steps: int, rate: float, data: Algorithmic, *callbacks: Any) -> Model:
    model = Model(
        decoder=decoder,
        objective=objective,
        optimizer=lambda p: torch.optim.AdamW(p, lr=rate, weight_decay=0.0),
    )
    decoder.train()
    arm_trainer(max_steps=steps, gradient_clip_val=1.0, callbacks=list(callbacks)).fit(model, datamodule=data)
    return model


def _held(data: Algorithmic, count: int = 512) -> Validation:
    rows: Any = data.dataset("val")
    samples = [rows[i] for i in range(min(count, len(rows)))]
    tokens, mask = (torch.stack([s[k] for s in samples]) for k in ("tokens", "mask"))
    lengths = torch.stack([torch.as_tensor(s["prompt_length"]) for s in samples])
    assert int(tokens[:, 0].min()) >= FIRST + 10  # the task's token goes first
    return Validation(tokens, mask, lengths, tokens[:, 0])


@torch.no_grad()
def _threshold(decoder: RoutedModel, held: Validation) -> float:
    """The least threshold whose routing skips as much as the controls do, by bisection; a skip moves later rhos."""
    low, high = 0.02, 0.98
    for _ in range(12):
        decoder.routers.threshold = middle = (low + high) / 2
        _, found = decoder.routed(None, held.tokens, held.mask, held.prompt_length)
        low, high = (low, middle) if float(found.skip_rate) >= SKIP else (middle, high)
    return high
