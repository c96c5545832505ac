"""Position prediction in pure torch: the head, the loss with its smoothed target, and how guesses are judged."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from quire.contracts import Batch, Decoder, Spec
from quire.errors import ConfigError
from quire.roles.tokens.contract import Layout, Segment, TokenEncoder, Tokens
from quire.roles.tokens.patches import patchify

TINY: dict[str, Any] = {
    "encoder": {
        "class_path": "ViTEncoder",
        "init_args": {"patch": 2, "width": 16, "depth": 1, "heads": 2, "positions": "none"},
    },
    "objective": "PositionPrediction",
}


class PositionHead(Decoder):
    """Tokens → one logit for each cell: where could this token have been? Zhai et al. 2022.

    A LayerNorm and a linear map, the same for all tokens. The number of classes is the layout's number of cells N;
    it is never typed by hand.

    Args:
        norm: Whether the LayerNorm comes first.
        bias: Whether the linear map has a bias.

    Needs:
        encoder: TokenEncoder.

    Returns:
        logits [B,N,N] float; row i belongs to token i, column j to cell j. A batch of sequences that are all shorter
        than the head was built for has only its own cells.

    Raises:
        ConfigError: tokens of another grid than the head was built for.
    """

    encoder: TokenEncoder

    def __init__(self, norm: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.with_norm, self.with_bias = norm, bias

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Position prediction on digits with this head as the model's decoder."""
        return {"model": {**TINY, "decoder": "PositionHead"}, "data": "Digits"}

    def build(self, spec: Spec) -> None:
        """Make norm and linear map for the encoder's width and cells."""
        super().build(spec)
        width, self.classes = spec.code("width", self), spec.code("cells", self)
        self.norm = nn.LayerNorm(width) if self.with_norm else nn.Identity()
        self.linear = nn.Linear(width, self.classes, bias=self.with_bias)

    def forward(self, codes: Tokens) -> Tensor:
        """Logits of every content token; prefix tokens have no place and get none."""
        cells = codes.layout.cells
        shorter = cells < self.classes and [len(s.grid) for s in codes.layout.segments] == [1]
        if cells != self.classes and not shorter:
            raise ConfigError(
                f"the position head has {self.classes} classes but the input gives {cells} tokens; "
                "rebuild the head or resize the images"
            )
        return self.linear(self.norm(codes.values))[..., :cells]


# ---- loss
def smoothed_target(layout: Layout, sigma: float) -> Tensor:
    """Row i is the target of a token at cell i: exp(-dist^2 / sigma^2) over its segment's cells, summing to 1.

    Wang et al. 2023 (DropPos), not part of MP3; here for any grid.

    Args:
        layout: Places of the N cells.
        sigma: Width in cells; 0 is the identity, so a hard target.

    Returns:
        [N,N] float.
    """
    if sigma <= 0:
        return torch.eye(layout.cells)
    at, segment = layout.coordinates.double(), layout.segment_id
    squared = (at[:, None] - at).square().sum(-1)
    squared[segment[:, None] != segment] = torch.inf
    return torch.softmax(-squared / sigma**2, 1).float()


def decayed(sigma: float, step: int, steps: int) -> float:
    """``sigma`` falling linearly to 0 over ``steps`` optimizer steps; constant when ``steps`` is 0."""
    return sigma * max(0.0, 1 - step / steps) if steps else sigma


def position_loss(logits: Tensor, cell: Tensor, real: Tensor | None = None, target: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over all real tokens, in the context or not.

    Args:
        logits: [B,T,N].
        cell: [B,T] int64, the true cell of each token.
        real: [B,T] bool, tokens that count; None for all.
        target: [N,N] rows of a smoothed target; None is one-hot.

    Returns:
        A scalar in nats; ln N when the logits say nothing.
    """
    flat, true = logits.flatten(0, 1).float(), cell.flatten()
    if target is None:
        each = cross_entropy(flat, true, reduction="none")
    else:
        each = -(target.to(flat.device)[true] * flat.log_softmax(-1)).sum(-1)
    if real is None:
        return each.mean()
    weight = real.flatten().to(each.dtype)
    return (each * weight).sum() / weight.sum().clamp(min=1)


# ---- what a prediction is judged by
@dataclass
class Guesses:
    """Predicted places of one batch, with what is needed to judge them.

    Args:
        logits: [B,T,N].
        cell: [B,T] int64, true cells.
        real: [B,T] bool, tokens that count.
        context: [B,T] bool, tokens that were keys and values.
        layout: Places of the N cells.
        batch: The batch they were made from.
    """

    logits: Tensor
    cell: Tensor
    real: Tensor
    context: Tensor
    layout: Layout
    batch: Batch

    @functools.cached_property
    def right(self) -> Tensor:
        """[B,T] float, 1 where the likeliest cell is the true one."""
        return (self.logits.argmax(-1) == self.cell).float()

    @functools.cached_property
    def distance(self) -> Tensor:
        """[B,T] float, Manhattan distance in cells from the likeliest cell to the true one."""
        at = self.layout.coordinates.to(self.logits.device)
        return (at[self.logits.argmax(-1)] - at[self.cell]).abs().sum(-1).float()

    @functools.cached_property
    def subsets(self) -> dict[str, Tensor]:
        """[B,T] bool by name: all, context, rest; nonconstant where there are images, voiced where there is audio."""
        found = {"all": self.real, "context": self.real & self.context, "rest": self.real & ~self.context}
        for name, chosen in told_apart(self.batch, self.layout).items():
            found[name] = self.real & chosen.gather(1, self.cell)
        return found

    def mean(self, values: Tensor, subset: str = "all") -> Tensor:
        """Mean of ``values`` [B,T] over a subset; NaN when the batch has no such token."""
        chosen = self.subsets[subset]
        return (values * chosen).sum() / chosen.sum()


def told_apart(batch: Batch, layout: Layout) -> dict[str, Tensor]:
    """Cells whose content can tell their place, [B,N] bool: ``nonconstant`` patches, ``voiced`` frames."""
    found: dict[str, Tensor] = {}
    pictures = [s for s in layout.segments if _is_picture(batch.get(s.field), s)]
    if pictures:
        rows = len(batch[pictures[0].field])
        cells = torch.ones(rows, layout.cells, dtype=torch.bool, device=batch[pictures[0].field].device)
        for s in pictures:
            cells[:, s.start : s.stop] = nonconstant(batch[s.field], (s.patch[0], s.patch[1]))
        found["nonconstant"] = cells
    if "audio" in batch and [s.field for s in layout.segments] == ["frames"]:
        found["voiced"] = voiced(batch["audio"], batch["frames"].shape[1], layout.only())
    return found


def _is_picture(value: Any, segment: Segment) -> bool:
    if not isinstance(value, Tensor) or value.ndim != 4 or len(segment.grid) != 2:
        return False
    return list(value.shape[2:]) == [g * p for g, p in zip(segment.grid, segment.patch)]


def nonconstant(image: Tensor, patch: tuple[int, int]) -> Tensor:
    """[B,C,H,W] → [B,N] bool, True where a patch has more than one value in some channel."""
    values = patchify(image, patch).unflatten(-1, (image.shape[1], -1))
    return (values.amax(-1) > values.amin(-1)).any(-1)


def voiced(audio: Tensor, frames: int, segment: Segment, below_peak: float = 30.0) -> Tensor:
    """Tokens with sound in them: [B,S] → [B,N] bool.

    Args:
        audio: [B,S] in [-1,1].
        frames: T, frames cut from it at even steps.
        segment: The N tokens, each a stack of frames.
        below_peak: Decibels that a token's power may lie below the loudest token's of its recording. [I]
    """
    length = audio.shape[1] // frames * segment.patch[0]
    power = audio[:, : length * segment.cells].unflatten(1, (segment.cells, length)).square().mean(-1)
    return power > power.amax(1, keepdim=True) * 10 ** (-below_peak / 10)
