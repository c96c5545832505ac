"""Low-rank adapters inside linear layers, in any model: y = W x + (alpha/rank) B A x."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import linear

from quire.errors import ConfigError

FUSED = ("c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv")
NAMES: dict[str, tuple[str, ...]] = {
    "q": ("q", "query", "q_proj", *FUSED),
    "k": ("k", "key", "k_proj", "key_value", *FUSED),
    "v": ("v", "value", "v_proj", "key_value", *FUSED),
    "o": ("o", "out", "o_proj", "out_proj", "c_proj", "dense"),
    "mlp": (
        "up",
        "down",
        "gate_proj",
        "up_proj",
        "down_proj",
        "fc1",
        "fc2",
        "wi",
        "wi_0",
        "wi_1",
        "wo",
        "c_fc",
        "c_proj",
    ),
}
"""What models call their projections; fused ones are adapted whole."""
MLP = ("mlp", "ffn", "feed_forward", "transition", "DenseReluDense")


class LowRank(nn.Module):
    """A linear layer with an adapter, which is 0 at first. In evaluation one product: the sum is kept until it changes.

    Args:
        inside: ``nn.Linear``, or transformers' ``Conv1D`` whose weight is [in, out].
        rank: Of the adapter.
        alpha: The adapter counts alpha/rank.
        dropout: On what the adapter reads, in training.
    """

    def __init__(self, inside: nn.Module, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.inside, self.scale, self.rate = inside, alpha / rank, dropout
        weight: Any = inside.weight
        self.turned = not isinstance(inside, nn.Linear)
        given, made = weight.shape if self.turned else weight.shape[::-1]
        self.down_rank = nn.Parameter(weight.new_empty(rank, given))
        self.up_rank = nn.Parameter(weight.new_zeros(made, rank))
        nn.init.kaiming_uniform_(self.down_rank, a=5**0.5)
        self.key: Any = None
        self.sum: Any = None

    @property
    def weight(self) -> Any:
        """The layer's own; some models look at its dtype."""
        return self.inside.weight

    @property
    def bias(self) -> Any:
        """The layer's own."""
        return self.inside.bias

    def forward(self, x: Tensor) -> Tensor:
        """[…,in] → […,out]."""
        if self.training or torch.is_grad_enabled():
            low = linear(drop(x, self.rate, self.training), self.down_rank)
            return self.inside(x) + self.scale * linear(low, self.up_rank)
        own: Any = self._parameters  # read at every token: no slow lookups
        inside: Any = self._modules["inside"]._parameters  # type: ignore[union-attr]
        weight, down, up = inside["weight"], own["down_rank"], own["up_rank"]
        key = (weight._version, down._version, up._version)
        if self.key != key:
            self._join(weight, down, up)
            self.key = key
        return linear(x, self.sum, inside["bias"])

    def _join(self, weight: Any, down: Any, up: Any) -> None:
        own = weight.t() if self.turned else weight
        with torch.inference_mode(False), torch.no_grad():
            self.sum = own + (self.scale * up @ down).to(own.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.key = None  # another device or precision
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "key": None, "sum": None}


def adapt(layers: list[nn.Module], rank: int, alpha: float, modules: list[str], dropout: float) -> None:
    """Wrap the named projections of every layer.

    Args:
        layers: Of a model; one that stands twice is adapted once.
        rank: r, at least 1.
        alpha: The adapter counts alpha/rank.
        modules: ``q``, ``k``, ``v``, ``o``, ``mlp``, or names that the model itself uses.
        dropout: On what adapters read, in [0, 1).

    Raises:
        ConfigError: an argument out of range, or a name that no layer has.
    """
    if rank < 1 or not 0 <= dropout < 1 or alpha <= 0:
        raise ConfigError(
            f"RoutedLoRA needs rank >= 1, lora_alpha > 0 and dropout in [0, 1); got {rank}, {alpha}, {dropout}"
        )
    linears = list(_linears(layers))
    for asked in modules:
        if not any(_named(asked, path, name) for _, path, name in linears):
            have = ", ".join(sorted({name for _, _, name in linears})) or "none"
            raise ConfigError(f"RoutedLoRA.modules names {asked!r}; the layers' projections are {have}")
    for holder, path, name in linears:
        if any(_named(asked, path, name) for asked in modules):
            setattr(holder, name, LowRank(getattr(holder, name), rank, alpha, dropout))


def _linears(layers: list[nn.Module]) -> Iterator[tuple[nn.Module, str, str]]:
    seen: set[int] = set()
    for layer in layers:
        for path, module in layer.named_modules():
            if id(module) in seen or isinstance(module, LowRank):
                continue
            seen.add(id(module))
            for name, child in module.named_children():
                if isinstance(child, nn.Linear) or type(child).__name__ == "Conv1D":
                    yield module, path, name


def _named(asked: str, path: str, name: str) -> bool:
    if asked not in NAMES:
        return name == asked
    inside_mlp = any(step in MLP for step in path.split("."))
    if asked == "mlp":
        return name in NAMES[asked] and (inside_mlp or name != "c_proj")
    return name in NAMES[asked] and not inside_mlp
