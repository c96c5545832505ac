"""Layers that a pass may go round, whatever model they stand in."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quire.errors import ConfigError

CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")

Run = Callable[["Gate", Tensor, tuple, dict], Any]


class Gate(nn.Module):
    """Stands in a layer's place and lets ``run`` say whether the layer runs; every other attribute is the layer's.

    Args:
        layer: The layer, kept as a plain reference: it belongs to its model.
        index: Its place.
        run: Called with the gate, what the layer is given, and its further arguments.
    """

    def __init__(self, layer: nn.Module, index: int, run: Run) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)
        self.index, self.run = index, run
        self.names = list(inspect.signature(layer.forward).parameters)

    def __getattr__(self, name: str) -> Any:
        if name in ("layer", "_modules", "_parameters", "_buffers"):
            raise AttributeError(name)
        return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's."""
        if not args:
            args = (kwargs.pop(self.names[0]),)
        return self.run(self, args[0], args[1:], kwargs)

    def through(self, x: Tensor, args: tuple, kwargs: dict) -> Any:
        """Run the layer."""
        made = self.layer(x, *args, **kwargs)
        if isinstance(made, tuple) and not self._shares_bias:
            kind = type(self.layer).__name__
            raise ConfigError(f"RoutedModel: {kind} returns several values, so it can't be skipped: use another model")
        return made

    def uncached(self, x: Tensor, args: tuple, kwargs: dict) -> Any:
        """Run the layer on its own tokens; nothing is written."""
        for name in CACHES:
            if name in kwargs:
                kwargs = {**kwargs, name: None}
            elif name in self.names and (at := self.names.index(name) - 1) < len(args):
                args = (*args[:at], None, *args[at + 1 :])
        return self.through(x, args, kwargs)

    def around(self, x: Tensor, args: tuple, kwargs: dict) -> Any:
        """What it was given, unchanged. A layer that makes the attention bias for those after it still makes that."""
        if not self._shares_bias:
            return x
        said = {**dict(zip(self.names[1:], args)), **kwargs}
        bias, cross = said.get("position_bias"), said.get("encoder_decoder_position_bias")
        if bias is None:
            cache = next((said[n] for n in CACHES if said.get(n) is not None), None)
            past = 0 if cache is None else int(cache.get_seq_length())
            owner: Any = next(m for m in self.layer.modules() if getattr(m, "has_relative_attention_bias", False))
            width = x.shape[1]
            bias = owner.compute_bias(width, past + width, device=x.device, past_seen_tokens=past)
        return x, bias, cross

    def change(self, made: Any, how: Callable[[Tensor], Tensor]) -> Any:
        """Replace the hidden states in what the layer returned."""
        return (how(made[0]), *made[1:]) if isinstance(made, tuple) else how(made)

    @property
    def _shares_bias(self) -> bool:
        return "position_bias" in self.names  # T5 and its kin: (hidden, bias, bias of the cross-attention)


def around(gate: Gate, x: Tensor, args: tuple, kwargs: dict) -> Any:
    """No row runs the layer."""
    return gate.around(x, args, kwargs)


class SomeRows:
    """Some rows run the layer, the others pass it by; what it writes for them is never read.

    Args:
        on: [B] bool.
    """

    def __init__(self, on: Tensor) -> None:
        self.on = on[:, None, None]

    def __call__(self, gate: Gate, x: Tensor, args: tuple, kwargs: dict) -> Any:
        """Row by row."""
        return gate.change(gate.through(x, args, kwargs), lambda made: torch.where(self.on, made, x))


class Stack:
    """Where a model keeps its layers, and others in their place for one pass.

    Args:
        model: The model.
        layers: From first to last; one block may stand several times.

    Raises:
        ConfigError: layers that stand in no list, or that share keys and values.
    """

    def __init__(self, model: nn.Module, layers: list[nn.Module]) -> None:
        self.layers = layers
        refuse_shared(layers)
        for path, part in model.named_modules():
            fits = isinstance(part, nn.ModuleList) and len(part) and not len(layers) % len(part)
            if fits and all(layer is part[i % len(part)] for i, layer in enumerate(layers)):
                parent, _, self.name = path.rpartition(".")
                self.holder = model.get_submodule(parent)
                return
        kind = type(model).__name__
        raise ConfigError(f"RoutedModel: the layers of {kind} stand in no ModuleList, so none can be skipped")

    def standing(self, modules: nn.ModuleList) -> Standing:
        """A context in which ``modules`` stand in the layers' place."""
        return Standing(self.holder._modules, self.name, modules)

    def gates(self, run: Run, only: list[int]) -> nn.ModuleList:
        """Gates before the layers ``only``, the other layers as they are."""
        return nn.ModuleList([Gate(m, i, run) if i in only else m for i, m in enumerate(self.layers)])

    def plan(self, on: Tensor) -> tuple[nn.ModuleList, int]:
        """Modules for a decided routing ``on`` [B,N], and how many layers they run."""
        modules: list[nn.Module] = []
        ran = 0
        whole, some = on.all(0).tolist(), on.any(0).tolist()
        for i, layer in enumerate(self.layers):
            ran += some[i]
            run = around if not some[i] else SomeRows(on[:, i].to(_device(layer)))
            modules.append(layer if whole[i] else Gate(layer, i, run))
        return nn.ModuleList(modules), ran


class Standing:
    """Swaps one entry of a module's children; put back even when the pass fails."""

    def __init__(self, children: dict[str, nn.Module | None], name: str, modules: nn.ModuleList) -> None:
        self.children, self.name, self.modules = children, name, modules

    def __enter__(self) -> None:
        self.before = self.children[self.name]
        self.children[self.name] = self.modules

    def __exit__(self, *error: object) -> None:
        self.children[self.name] = self.before


def refuse_shared(layers: list[nn.Module]) -> None:
    """Raise ``ConfigError`` where a layer reads another's keys and values: with that one skipped there are none."""
    for i, layer in enumerate(layers):
        for part in layer.modules():
            if getattr(part, "is_kv_shared_layer", False):
                kind = getattr(part, "layer_type", None)
                own = [j for j in range(i) if not _shares(layers[j]) and _kind(layers[j]) == kind]
                raise ConfigError(
                    f"RoutedModel: layer {i} uses the keys and values of layer {own[-1] if own else '?'}, "
                    "so neither can be skipped: use a model whose layers each have their own"
                )


def _shares(layer: nn.Module) -> bool:
    return any(getattr(m, "is_kv_shared_layer", False) for m in layer.modules())


def _kind(layer: nn.Module) -> Any:
    return next((m.layer_type for m in layer.modules() if hasattr(m, "layer_type")), None)


def _device(layer: nn.Module) -> torch.device:
    return next((p.device for p in layer.parameters()), torch.device("cpu"))
