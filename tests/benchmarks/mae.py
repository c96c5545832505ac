"""A masked autoencoder in plain PyTorch on timm's blocks, one screen long: what Quire's Model is measured against."""

from __future__ import annotations

import functools
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn


def table(side: int, width: int) -> Tensor:
    """Fixed positions [side², width]: y in the first half, x in the second, sines before cosines."""
    count = width // 4
    angle = torch.arange(side, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(count) / count)
    part = torch.cat([angle.sin(), angle.cos()], 1)
    y, x = part[:, None].expand(-1, side, -1), part[None].expand(side, -1, -1)
    return torch.cat([y, x], -1).reshape(side * side, width).float()


def blocks(width: int, depth: int, heads: int) -> nn.Sequential:
    norm: Any = functools.partial(nn.LayerNorm, eps=1e-6)
    return nn.Sequential(*(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)))


class Encoder(nn.Module):
    def __init__(self, side: int, values: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.stem = nn.ModuleDict({"proj": nn.Linear(values, width)})
        self.prefix = nn.ParameterList([nn.Parameter(torch.zeros(1, width))])
        self.blocks = blocks(width, depth, heads)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.register_buffer("places", table(side, width), persistent=False)

    def forward(self, patches: Tensor, keep: Tensor) -> Tensor:
        kept = patches.gather(1, keep[..., None].expand(-1, -1, patches.shape[-1]))
        x = self.stem["proj"]((kept - 0.5) / 0.5) + self.places[keep]
        x = torch.cat([self.prefix[0].expand(len(x), -1, -1), x], 1)
        return self.norm(self.blocks(x))


class Decoder(nn.Module):
    def __init__(self, side: int, values: int, inside: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.inlet = nn.Linear(inside, width)
        self.empty = nn.Parameter(torch.zeros(width))
        self.blocks = blocks(width, depth, heads)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, values)
        self.register_buffer("places", table(side, width), persistent=False)

    def forward(self, codes: Tensor, keep: Tensor, rest: Tensor) -> Tensor:
        codes = self.inlet(codes)
        first, x = codes[:, :1], codes[:, 1:]
        restore = torch.cat([keep, rest], 1).argsort(1)
        x = torch.cat([x, self.empty.expand(len(x), rest.shape[1], -1)], 1)
        x = x.gather(1, restore[..., None].expand(-1, -1, x.shape[-1])) + self.places
        x = self.blocks(torch.cat([first, x], 1))[:, 1:]
        return self.head(self.norm(x.gather(1, rest[..., None].expand(-1, -1, x.shape[-1]))))


class MAE(nn.Module):
    """Sizes by name; ``forward`` is the loss of one batch for given noise."""

    def __init__(
        self, image: int, patch: int, encoder: dict[str, int], decoder: dict[str, int], masking: float
    ) -> None:
        super().__init__()
        self.patch, self.masking, side, values = patch, masking, image // patch, 3 * patch * patch
        self.encoder = Encoder(side, values, **encoder)
        self.decoder = Decoder(side, values, encoder["width"], **decoder)

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        patches = nn.functional.unfold(image, self.patch, stride=self.patch).transpose(1, 2)
        order, kept = noise.argsort(1), noise.shape[1] - int(self.masking * noise.shape[1])
        keep, rest = order[:, :kept].sort(1).values, order[:, kept:].sort(1).values
        with torch.no_grad():
            wanted = patches.gather(1, rest[..., None].expand(-1, -1, patches.shape[-1]))
            var, mean = torch.var_mean(wanted, -1, keepdim=True)
            wanted = (wanted - mean) / (var + 1e-6).sqrt()
        return (self.decoder(self.encoder(patches, keep), keep, rest) - wanted).square().mean()
