"""Where the sites of a model lie: its blocks, their attention, its output projection, their feed-forward."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from quire.errors import ConfigError

KINDS = ("resid", "resid_pre", "attn_out", "mlp_out", "z", "heads")
ATTENTIONS = ("attn", "self_attn", "attention", "self_attention", "mixer")
PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "out", "proj", "wo", "o")
FEEDS = ("mlp", "feed_forward", "ffn", "ff", "block_sparse_moe", "moe")
LAST_MAPS = ("dense_4h_to_h", "down_proj", "c_proj", "fc_out", "fc2", "down", "wo", "w2")
INPUT = ":in"
"""Ends a module path whose input is meant, not its output."""


@dataclass(frozen=True)
class Place:
    """One site, resolved.

    Attributes:
        site: The name it was asked by.
        module: What is hooked.
        side: ``output``, ``input``, or ``heads``: per head behind an output projection.
        also: A module whose input is the same tensor, for blocks that are not always called as a whole.
        heads: Attention heads at a ``z`` or ``heads`` site; 0 elsewhere.
        values: Heads of the values, fewer than ``heads`` under grouped queries.
        block: Number of the block, or -1 for a module path.
    """

    site: str
    module: nn.Module
    side: str
    also: nn.Module | None = None
    heads: int = 0
    values: int = 0
    block: int = -1


class Anatomy:
    """The blocks of a model and what lies in each.

    Args:
        root: The model whose modules are hooked.
        name: What to call it in errors.
    """

    def __init__(self, root: nn.Module, name: str) -> None:
        self.root, self.name = root, name
        self.path, self.blocks = blocks_of(root)

    def sites(self) -> list[str]:
        """Every named site, block by block."""
        return [f"blocks.{i}.{kind}" for i in range(len(self.blocks)) for kind in KINDS if self._has(i, kind)]

    def place(self, site: str) -> Place:
        """The module and the side of a site.

        Args:
            site: ``blocks.i.resid|resid_pre|attn_out|mlp_out|z|heads``, or a module's dotted path, its output; with
                ``:in`` behind it, its input.

        Raises:
            ConfigError: no such site, with the nearest names and how to list all.
        """
        match = re.fullmatch(r"blocks\.(\d+)\.(\w+)", site)
        if match and match[2] in KINDS and int(match[1]) < len(self.blocks):
            return self._named(site, int(match[1]), match[2])
        path = site.removesuffix(INPUT)
        modules = dict(self.root.named_modules())
        if path in modules and path:
            return Place(site, modules[path], "input" if site.endswith(INPUT) else "output")
        names = self.sites()
        near = get_close_matches(site, names, 3, 0.5) or get_close_matches(site, [n for n in modules if n], 3, 0.5)
        most = f"; it has blocks 0 to {len(self.blocks) - 1}" if self.blocks else ""
        raise ConfigError(
            f"{self.name} has no site {site!r}{most}; nearest: {', '.join(near or names[:3]) or 'none'};"
            " quire harvest --list-sites with the same data lists them all"
        )

    def _has(self, i: int, kind: str) -> bool:
        attention = attention_of(self.blocks[i])
        if kind in ("attn_out", "z", "heads"):
            return attention is not None and projection_of(attention) is not None
        return feed_of(self.blocks[i]) is not None if kind == "mlp_out" else True

    def _named(self, site: str, i: int, kind: str) -> Place:
        block = self.blocks[i]
        if kind == "resid":
            following = self.blocks[i + 1] if i + 1 < len(self.blocks) else None
            return Place(site, block, "output", self._entry(following), block=i)
        if kind == "resid_pre":
            return Place(site, block, "input", self._entry(block), block=i)
        if kind == "mlp_out":
            feed = feed_of(block)
            if feed is None:
                raise ConfigError(f"{self._path(i)} of {self.name} has no feed-forward part; give a module's path")
            return Place(site, feed, "output", block=i)
        attention = attention_of(block)
        if attention is None:
            raise ConfigError(
                f"{self._path(i)} of {self.name} has no attention among {', '.join(ATTENTIONS)}; give a module's path"
            )
        projection = projection_of(attention)
        if projection is None:
            where = f"{self._path(i)}.{path_in(block, attention)}"
            raise ConfigError(
                f"module {where} has no output projection ({type(attention).__name__}, looked for"
                f" {', '.join(PROJECTIONS)}); give its path with {INPUT} behind it as the site"
            )
        if kind == "attn_out":
            return Place(site, projection, "output", block=i)
        width = input_width(projection)
        heads, values = head_counts(attention, self.root, width)
        if width % heads:
            raise ConfigError(f"site {site} gives width {width}, which {heads} heads do not divide")
        return Place(site, projection, "input" if kind == "z" else "heads", heads=heads, values=values, block=i)

    def _entry(self, block: nn.Module | None) -> nn.Module | None:
        """The first norm of one of our own token blocks, which run piecewise under masks; the final norm after all."""
        first: Any = self.blocks[0]
        if not hasattr(getattr(first, "attn", None), "qkv") or not hasattr(first, "norm1"):
            return None
        if block is not None:
            return block.norm1  # type: ignore[return-value]
        owner = self.root.get_submodule(self.path.rpartition(".")[0])
        return getattr(owner, "norm", None)

    def _path(self, i: int) -> str:
        return f"{self.path}.{i}"


def blocks_of(root: nn.Module) -> tuple[str, list[nn.Module]]:
    """Path and items of the list of blocks: the decoder's where there are two; empty when nothing looks like one."""
    lists = [(n, m) for n, m in root.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m)]
    alike = [(n, m) for n, m in lists if len({type(b) for b in m}) == 1 and next(m[0].children(), None) is not None]
    found = [(n, m) for n, m in alike if attention_of(m[0]) is not None] or alike
    found = [(n, m) for n, m in found if "decoder" in n.split(".")] or found
    if not found:
        return "", []
    longest = max(len(m) for _, m in found)
    name, chosen = next((n, m) for n, m in found if len(m) == longest)
    return name, list(chosen)


def attention_of(block: nn.Module) -> nn.Module | None:
    """The first self-attention in a block."""
    for name, part in block.named_modules():
        last = name.rpartition(".")[2]
        if name.count(".") < 3 and (last in ATTENTIONS or (name and type(part).__name__.endswith("SelfAttention"))):
            return part
    return next((m for n, m in block.named_modules() if n and type(m).__name__.endswith("Attention")), None)


def projection_of(attention: nn.Module) -> nn.Module | None:
    """The map that joins the heads; the last module of a fitting name that has a weight."""
    fitting = [m for n, m in attention.named_modules() if n.rpartition(".")[2] in PROJECTIONS and is_map(m)]
    return fitting[-1] if fitting else None


def feed_of(block: nn.Module) -> nn.Module | None:
    """The feed-forward part; its last map where the part adds the residual itself or is not a module of its own."""
    for name, part in block.named_modules():
        last, kind = name.rpartition(".")[2], type(part).__name__
        if name and name.count(".") < 3 and (last in FEEDS or kind.endswith(("MLP", "FeedForward", "DenseActDense"))):
            if "residual" in inspect.signature(part.forward).parameters:
                return next((m for n, m in part.named_modules() if n in LAST_MAPS), None)
            return part
    return next((m for n, m in block.named_children() if n in LAST_MAPS and is_map(m)), None)


def is_map(module: nn.Module) -> bool:
    """Whether it is a linear map: a weight with two axes."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def input_width(projection: nn.Module) -> int:
    """Width of what a linear map takes; transformers' Conv1D keeps its weight the other way round."""
    weight: Any = projection.weight
    return int(weight.shape[0] if type(projection).__name__ == "Conv1D" else weight.shape[1])


def slices(projection: nn.Module, heads: int) -> Tensor:
    """[H,d_h,D]: each head's slice of the output projection."""
    weight: Any = projection.weight
    rows = weight if type(projection).__name__ == "Conv1D" else weight.T
    return rows.unflatten(0, (heads, -1))


def head_counts(attention: nn.Module, root: nn.Module, width: int) -> tuple[int, int]:
    """Heads of queries and of values."""
    config: Any = getattr(root, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    heads = 0
    for name in ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads"):
        heads = heads or int(getattr(attention, name, 0) or 0)
    for name in ("head_dim", "head_size"):
        if not heads and getattr(attention, name, None):
            heads = width // int(getattr(attention, name))
    for name in ("num_attention_heads", "n_head", "num_heads", "decoder_attention_heads"):
        heads = heads or int(getattr(config, name, 0) or 0)
    if not heads:
        raise ConfigError(f"{type(attention).__name__} does not say how many heads it has; use attn_out or a path")
    groups = getattr(attention, "num_key_value_groups", None)
    values = heads // int(groups) if groups else int(getattr(config, "num_key_value_heads", None) or heads)
    return heads, values


def path_in(block: nn.Module, part: nn.Module) -> str:
    """Dotted path of ``part`` inside ``block``."""
    return next((n for n, m in block.named_modules() if m is part), "?")
