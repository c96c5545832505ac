"""The attention trunk on timm's pre-norm blocks: all tokens, a kept subset, or a context of keys and values."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quire.contracts import Batch, Spec
from quire.errors import ConfigError
from quire.roles.tokens.contract import Layout, Subset, TokenEncoder, Tokens, gather, indices
from quire.roles.tokens.positions import Positions, check_kind, rotate

Rotation = tuple[Tensor, Tensor]


def attend(
    attn: Any,
    queries: Tensor,
    source: Tensor,
    mask: Tensor | None = None,
    turn_q: Rotation | None = None,
    turn_k: Rotation | None = None,
) -> Tensor:
    """timm's attention with queries from one place and keys and values from another.

    ``attn.qkv`` is cut before projecting, so keys and values cost what ``source`` is long.

    Args:
        attn: A timm ``Attention``.
        queries: [B,N,D], normalised.
        source: [B,M,D], normalised; ``queries`` itself for self-attention.
        mask: [B,M] bool, True = real key; None when all are.
        turn_q: Rotary angles of the queries.
        turn_k: Rotary angles of the keys.

    Returns:
        [B,N,D].
    """
    size, heads = attn.qkv.weight.shape[0] // 3, attn.num_heads
    weight, bias = attn.qkv.weight, attn.qkv.bias
    if source is queries:
        q, k, v = F.linear(queries, weight, bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    else:
        q = F.linear(queries, weight[:size], None if bias is None else bias[:size]).unflatten(-1, (heads, -1))
        q = q.transpose(1, 2)
        kv = F.linear(source, weight[size:], None if bias is None else bias[size:])
        k, v = kv.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if turn_q is not None and turn_k is not None:
        q, k = rotate(q, turn_q), rotate(k, turn_k)
    drop = attn.attn_drop.p if attn.training else 0.0
    keys = None if mask is None else mask[:, None, None, :]
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=keys, dropout_p=drop)
    x = attn.norm(x.transpose(1, 2).flatten(2)) if hasattr(attn, "norm") else x.transpose(1, 2).flatten(2)
    if getattr(attn, "gate", None) is not None:
        x = x * attn.gate(queries).sigmoid()
    return attn.proj_drop(attn.proj(x))


def run(
    blocks: Any,
    x: Tensor,
    context: Tensor | None = None,
    context_update: bool = True,
    mask: Tensor | None = None,
    rotation: Rotation | None = None,
) -> Tensor:
    """Blocks one after the other.

    Args:
        blocks: timm pre-norm ``Block``s.
        x: [B,S,D], prefix tokens included.
        context: [B,M] rows of ``x`` that are keys and values in every block; None for all.
        context_update: False takes keys and values of all blocks from the first block's input.
        mask: [B,S] bool, True = real; None without padding.
        rotation: Rotary angles of the rows of ``x``.

    Returns:
        [B,S,D].
    """
    if context is None and mask is None and rotation is None:
        for block in blocks:
            x = block(x)
        return x
    keys, turn = mask, rotation
    if context is not None:
        keys = None if mask is None else mask.gather(1, context)
        turn = None if rotation is None else tuple(_turned(r, context) for r in rotation)  # type: ignore[assignment]
    frozen = None if context is None or context_update else gather(x, context)
    for block in blocks:
        z = block.norm1(x)
        if context is None:
            source = z
        else:
            source = gather(z, context) if frozen is None else block.norm1(frozen)
        x = x + block.drop_path1(block.ls1(attend(block.attn, z, source, keys, rotation, turn)))
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return x


def _turned(angles: Tensor, context: Tensor) -> Tensor:
    index = context[:, None, :, None].expand(-1, -1, -1, angles.shape[-1])
    return angles.expand(len(context), -1, -1, -1).gather(2, index)


def run_tokens(
    blocks: Any,
    norm: Any,
    tokens: Tokens,
    context: Subset | Tensor | None = None,
    context_update: bool = True,
    rotation: Rotation | None = None,
) -> Tokens:
    """``run`` and the final norm on Tokens; prefix tokens are always real and always in the context."""
    count, prefix = tokens.values.shape[1], tokens.prefix.shape[1]
    x = tokens.joined()
    chosen = None
    if context is not None:
        chosen = indices(context, count, "context")
        if prefix:
            first = torch.arange(prefix, device=x.device).expand(len(x), prefix)
            chosen = torch.cat([first, chosen + prefix], 1)
    mask = F.pad(tokens.mask, (prefix, 0), value=True) if tokens.padded else None
    x = norm(run(blocks, x, chosen, context_update, mask, rotation))
    return tokens.with_values(x[:, prefix:], x[:, :prefix])


class KeylessBias(nn.Module):
    """A fused query, key, value projection with biases on queries and values only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * width, width))
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))

    @property
    def bias(self) -> Tensor:
        """[3D], zeros in the keys' part."""
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def forward(self, x: Tensor) -> Tensor:
        """[…,D] → […,3D]."""
        return F.linear(x, self.weight, self.bias)


def make_blocks(
    width: int,
    depth: int,
    heads: int,
    mlp_ratio: float = 4.0,
    key_bias: bool = True,
    layer_scale: float | None = None,
    drop_path: float = 0.0,
) -> nn.ModuleList:
    """timm blocks; matrices start Xavier-uniform (q, k and v each as its own matrix), biases at 0.

    Raises:
        ConfigError: heads that don't divide the width.
    """
    from timm.models.vision_transformer import Block

    if heads < 1 or width % heads:
        raise ConfigError(f"width={width} is not divisible by heads={heads}")
    blocks = nn.ModuleList()
    for i in range(depth):
        block = Block(
            width,
            heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=True,
            init_values=layer_scale,
            drop_path=drop_path * i / max(1, depth - 1),
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        )
        if not key_bias:
            block.attn.qkv = KeylessBias(width)
        for module in block.modules():
            if isinstance(module, nn.Linear):
                xavier(module)
        for third in block.attn.qkv.weight.chunk(3):
            nn.init.xavier_uniform_(third)
        blocks.append(block)
    return blocks


def xavier(linear: nn.Linear) -> nn.Linear:
    """Start a linear map Xavier-uniform with zero bias."""
    nn.init.xavier_uniform_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


class TrunkEncoder(TokenEncoder):
    """A pre-norm transformer over cells that a subclass cuts and embeds: ``layout``, ``cut``, ``make_stem``.

    Args:
        width: D.
        depth: Number of blocks.
        heads: Attention heads; they divide the width.
        mlp_ratio: Hidden width of the MLP over D.
        class_token: Whether a class token goes before the others.
        positions: What ``embed`` adds.
        key_bias: Whether keys have a bias.
        layer_scale: Start of a learned factor on each residual branch; None for no factor.
        drop_path: Share of residual branches dropped in the last block, rising linearly from 0.
        final_norm: Whether a LayerNorm follows the last block.
    """

    capabilities = frozenset({"subset", "context", "features"})
    kinds = ("none", "sincos", "learned")

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        class_token: bool,
        positions: str,
        key_bias: bool,
        layer_scale: float | None,
        drop_path: float,
        final_norm: bool,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ConfigError(f"{type(self).__name__} has width={width}, not divisible by heads={heads}")
        self.width, self.depth, self.heads, self.mlp_ratio = width, depth, heads, mlp_ratio
        self.positions = check_kind(positions, self.kinds)
        self.prefix_tokens = int(class_token)
        self.key_bias, self.layer_scale, self.drop_path, self.final_norm = key_bias, layer_scale, drop_path, final_norm
        self.table_std = 0.02
        self.places: Positions | None = None

    # ---- what a subclass writes
    def cut(self, batch: Batch) -> Tensor:
        """Raw cells [B,N,…] in the layout's order."""
        raise NotImplementedError

    def make_stem(self, spec: Spec) -> nn.Module:
        """The map from raw cells [B,K,…] to [B,K,D]; it looks at one cell at a time."""
        raise NotImplementedError

    # ---- life
    def build(self, spec: Spec) -> None:
        """Make stem, positions, class token, blocks and norm."""
        super().build(spec)
        layout = self.layout(spec)
        self.stem = self.make_stem(spec)
        if self.positions in ("sincos", "learned"):
            self.places = Positions(self.positions, layout, self.width, self.table_std)
        if self.prefix_tokens:
            self.prefix = nn.ParameterList([nn.Parameter(torch.randn(self.prefix_tokens, self.width) * 0.02)])
        self.blocks = make_blocks(
            self.width, self.depth, self.heads, self.mlp_ratio, self.key_bias, self.layer_scale, self.drop_path
        )
        self.norm = nn.LayerNorm(self.width, eps=1e-6) if self.final_norm else nn.Identity()

    def attach_positions(self, kind: str, init: str = "zeros", std: float = 0.02) -> None:
        """Give this encoder positions; ``init_args`` says so, so a checkpoint made later rebuilds with them."""
        if check_kind(kind) == "none":
            raise ConfigError("attach_positions needs kind learned or sincos, got 'none'")
        if init not in ("zeros", "normal"):
            raise ConfigError(f"positions start with zeros or normal, got {init!r}")
        if self.positions == kind:
            return
        if self.positions != "none":
            raise ConfigError(f"{type(self).__name__} has {self.positions} positions already; it can't get {kind} ones")
        self.positions, self.table_std = kind, std if init == "normal" else 0.0
        self.init_args["positions"] = kind
        if self.built:
            like = next(self.blocks.parameters())
            self.places = Positions(kind, self.built_layout, self.width, self.table_std).to(like.device, like.dtype)

    def layers(self) -> list[nn.Module]:
        """Embedding, then the blocks."""
        first = [self.stem, *([self.places] if self.places is not None else [])]
        if self.prefix_tokens:
            first.append(self.prefix)
        return [nn.ModuleList(first), *self.blocks]

    # ---- use
    def embed(self, batch: Batch, keep: Subset | Tensor | None = None) -> Tokens:
        """Tokens with positions; with ``keep`` only those cells are cut out and embedded."""
        layout = self.layout(batch)
        cells, mask = self.cut(batch), self.token_mask(batch)
        rows = len(cells)
        index = torch.arange(layout.cells, device=cells.device).expand(rows, -1)
        places = None if self.places is None else self.places(layout)
        if keep is not None:
            index = indices(keep, layout.cells)
            cells = gather(cells, index)
            mask = None if mask is None else mask.gather(1, index)
            places = None if places is None else places[index]
        values = self.stem(cells)
        if places is not None:
            values = values + places.to(values.dtype)
        prefix = self.prefix[0].to(values.dtype).expand(rows, -1, -1) if self.prefix_tokens else None
        return Tokens(values, index, layout, mask, prefix)  # type: ignore[arg-type]

    def encode(
        self,
        tokens: Tokens,
        keep: Subset | Tensor | None = None,
        context: Subset | Tensor | None = None,
        context_update: bool = True,
    ) -> Tokens:
        """Run the blocks and the final norm on all, kept, or context-restricted tokens."""
        if keep is not None:
            tokens = tokens.take(indices(keep, tokens.values.shape[1]))
        return run_tokens(self.blocks, self.norm, tokens, context, context_update, self.rotation(tokens))

    def forward(
        self,
        batch: Batch,
        keep: Subset | Tensor | None = None,
        context: Subset | Tensor | None = None,
        context_update: bool = True,
    ) -> Tokens:
        """``embed`` of the kept cells only, then ``encode``."""
        return self.encode(self.embed(batch, keep), None, context, context_update)

    def features(self, batch: Batch, layer: int = -1) -> Tokens:
        """Hidden states before the final norm, after block ``layer`` (0: embedded tokens; -1: last block)."""
        if not -self.depth - 1 <= layer <= self.depth:
            raise ConfigError(f"features has layer {layer}; {type(self).__name__} has layers 0..{self.depth}")
        upto = layer if layer >= 0 else self.depth + 1 + layer
        tokens = self.embed(batch)
        return run_tokens(self.blocks[:upto], nn.Identity(), tokens, rotation=self.rotation(tokens))

    def rotation(self, tokens: Tokens) -> Rotation | None:
        """Rotary angles of prefix and content tokens; None where positions aren't rotary."""
        return None
