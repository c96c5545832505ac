"""Masked reconstruction: targets, a decoder over the full grid, and the objective. The control of masked methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quire.contracts import Batch, Losses, Objective, Part, Spec, build
from quire.errors import ConfigError
from quire.roles.masking import Masking, RandomMask, tiny_with
from quire.roles.tokens.blocks import make_blocks, run_tokens, xavier
from quire.roles.tokens.contract import CellDecoder, Layout, Subset, TokenEncoder, Tokens, gather
from quire.roles.tokens.patches import patchify
from quire.roles.tokens.positions import Positions, check_kind

if TYPE_CHECKING:
    from quire.model import Model


class Target(Part):
    """What is asked for each cell: vectors [B,N,F], or ids [B,N] of V classes.

    Attributes:
        gives_ids: True for ids.
    """

    gives_ids: ClassVar[bool] = False

    def size(self, spec: Spec) -> int:
        """F or V, given a spec with the encoder's codes. Called once it is built."""
        raise NotImplementedError

    def forward(self, batch: Batch, layout: Layout) -> Tensor:
        """Targets of all N cells, without a gradient."""
        raise NotImplementedError


class PatchPixels(Target):
    """The values of each cell: pixels of a patch, or a stack of frames. He et al. 2022.

    Args:
        normalize: Subtract each cell's mean and divide by its standard deviation (unbiased).

    Returns:
        [B,N,F] float32, values channel first as in a convolution's kernel.

    Raises:
        ConfigError: cells that aren't numbers, or several segments.
    """

    def __init__(self, normalize: bool = True) -> None:
        super().__init__()
        self.normalize = normalize

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Masked reconstruction of raw digits."""
        run = tiny_with("RandomMask")
        target = {"class_path": "PatchPixels", "init_args": {"normalize": False}}
        run["model"]["objective"] = {"class_path": "MaskedReconstruction", "init_args": {"target": target}}
        return run

    def size(self, spec: Spec) -> int:
        """Numbers in one cell."""
        return int(spec.code("patch_values", self))

    @torch.no_grad()
    def forward(self, batch: Batch, layout: Layout) -> Tensor:
        """[B,N,F]."""
        segment = layout.only()
        values = batch[segment.field]
        if not values.is_floating_point():
            raise ConfigError(f"PatchPixels needs numbers; {segment.field} holds ids: use a target that gives ids")
        if len(segment.grid) == 2:
            cells = patchify(values, (segment.patch[0], segment.patch[1])).float()
        else:
            cells = values.reshape(len(values), segment.cells, -1).float()
        if not self.normalize:
            return cells
        var, mean = torch.var_mean(cells, -1, keepdim=True, correction=int(cells.shape[-1] > 1))
        return (cells - mean) / (var + 1e-6).sqrt()


class TokenIds(Target):
    """The ids of the cells themselves, for sequences of words: with ``loss: ce`` a masked language model.

    Returns:
        [B,N] int64.

    Raises:
        ConfigError: a field that holds no ids, or several segments.
    """

    gives_ids: ClassVar[bool] = True

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Masked words of the standard library's documentation."""
        trunk = {"width": 16, "depth": 1, "heads": 2}
        objective = {"masking": 0.3, "target": "TokenIds", "loss": "ce"}
        return {
            "model": {
                "encoder": {"class_path": "TextEncoder", "init_args": {**trunk, "lm_head": False}},
                "decoder": {"class_path": "GridDecoder", "init_args": trunk},
                "objective": {"class_path": "MaskedReconstruction", "init_args": objective},
            },
            "data": {"class_path": "TextTokens", "init_args": {"source": "stdlib:docs", "length": 16}},
        }

    def size(self, spec: Spec) -> int:
        """Size of the vocabulary."""
        return int(spec.code("vocab_size", self))

    def forward(self, batch: Batch, layout: Layout) -> Tensor:
        """[B,N]."""
        segment = layout.only()
        if batch[segment.field].is_floating_point():
            raise ConfigError(f"TokenIds needs ids; {segment.field} holds numbers: use PatchPixels")
        return batch[segment.field]


class GridDecoder(CellDecoder):
    """Tokens → a prediction for every cell of the full grid, with mask tokens where none was kept. He et al. 2022.

    Args:
        width: Width of its own trunk.
        depth: Number of blocks.
        heads: Attention heads; they divide the width.
        mlp_ratio: Hidden width of the MLP over the width.
        positions: ``sincos`` or ``learned``; added to all cells.
        output_size: Numbers or classes for each cell; null takes them from the objective's target, or, without
            one, the numbers in a cell.

    Returns:
        [B,N,F], or [B,N-K,F] for the cells that a Subset left out.

    Raises:
        ConfigError: sizes that don't divide, or an output size that isn't the target's.
    """

    def __init__(
        self,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        positions: str = "sincos",
        output_size: int | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ConfigError(f"GridDecoder has width={width}, not divisible by heads={heads}")
        self.width, self.depth, self.heads, self.mlp_ratio = width, depth, heads, mlp_ratio
        self.positions, self.output_size = check_kind(positions, ("sincos", "learned")), output_size
        self.refer("target", None)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A masked autoencoder on digits."""
        return tiny_with("RandomMask")

    def predicts(self, target: Target) -> None:
        """Take the size of the head from ``target``; an objective says so before anything is built."""
        asked = self.__dict__["target"]
        if asked is not None and asked is not target and type(asked) is not type(target):
            raise ConfigError(
                f"GridDecoder predicts {type(asked).__name__}, it can't predict {type(target).__name__} too"
            )
        self.refer("target", target)

    def build(self, spec: Spec) -> None:
        """Make the trunk and the head."""
        super().build(spec)
        size, target = self.output_size, self.__dict__["target"]
        if target is not None:
            build(target, spec)
            wanted = target.size(spec)
            if size is not None and size != wanted:
                what = "codes" if target.gives_ids else "numbers"
                raise ConfigError(f"target has {wanted} {what} but the head has {size}: drop decoder.output_size")
            size = wanted
        elif size is None:
            size = int(spec.code("patch_values", self))
        if self.output_size is None:
            self.init_args["output_size"] = size  # so that it can be reloaded without the objective
        self.inlet = xavier(nn.Linear(spec.code("width", self), self.width))
        self.empty = nn.Parameter(torch.randn(self.width) * 0.02)
        self.places = Positions(self.positions, Layout.read(spec.code("segments", self)), self.width)
        self.blocks = make_blocks(self.width, self.depth, self.heads, self.mlp_ratio)
        self.norm = nn.LayerNorm(self.width, eps=1e-6)
        self.head = xavier(nn.Linear(self.width, size))

    def forward(self, codes: Tokens, subset: Subset | None = None, mask: Tensor | None = None) -> Tensor:
        """Predict.

        Args:
            codes: The encoder's tokens; when they are fewer than the cells, ``index`` says which ones.
            subset: The draw that kept them; then only its ``rest`` is predicted.
            mask: [B,N] bool, True = real; None when no cell is padding.
        """
        layout, cells = codes.layout, codes.layout.cells
        chosen = subset
        if chosen is None and codes.values.shape[1] < cells:
            chosen = Subset.of(codes.index, cells, check=False)
        x = self.inlet(codes.values)
        if chosen is not None:
            x = chosen.unshuffle(torch.cat([x, self.empty.to(x.dtype).expand(len(x), cells - x.shape[1], -1)], 1))
        x = x + self.places(layout).to(x.dtype)
        index = torch.arange(cells, device=x.device).expand(len(x), -1)
        if mask is None and chosen is None and codes.padded:
            mask = codes.mask
        grid = Tokens(x, index, layout, mask, self.inlet(codes.prefix))  # type: ignore[arg-type]
        x = run_tokens(self.blocks, nn.Identity(), grid).values
        if subset is not None:
            x = gather(x, subset.rest)
        return self.head(self.norm(x))


class MaskedReconstruction(Objective):
    """Predict the cells that the encoder did not see. He et al. 2022 (MAE).

    The encoder gets the kept cells only; the loss is over the others only.

    Args:
        masking: Which cells are kept; a number is the ratio of ``RandomMask``.
        target: What is predicted for each cell; null is ``PatchPixels``.
        loss: ``mse`` or ``l1`` for vectors, ``ce`` for ids.

    Needs:
        encoder: TokenEncoder that takes a subset. decoder: GridDecoder.

    Returns:
        ``reconstruction``: mean over masked real cells (and the numbers in each).

    Raises:
        ConfigError: an unknown loss, one that doesn't fit the target, or nothing masked.
    """

    encoder: TokenEncoder
    decoder: GridDecoder
    requires = {"encoder": frozenset({"subset"})}

    def __init__(
        self,
        masking: Masking | float = 0.75,
        target: Target | None = None,
        loss: Literal["mse", "l1", "ce"] = "mse",
    ) -> None:
        super().__init__()
        self.masking = masking if isinstance(masking, Masking) else RandomMask(masking)
        self.target = target or PatchPixels()
        if loss not in ("mse", "l1", "ce"):
            raise ConfigError(f"MaskedReconstruction.loss must be mse, l1 or ce, got {loss!r}")
        if self.target.gives_ids != (loss == "ce"):
            fits = "ce" if self.target.gives_ids else "mse or l1"
            raise ConfigError(f"loss={loss} doesn't fit the target {type(self.target).__name__}: use {fits}")
        self.loss = loss

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A masked autoencoder on digits."""
        return tiny_with("RandomMask")

    def check(self, model: Model) -> None:
        """Tell the decoder what it predicts."""
        model.decoder.role(GridDecoder).predicts(self.target)

    def forward(self, model: Model, batch: Batch) -> Losses:
        """One draw, one pass."""
        encoder = model.encoder
        layout, mask = encoder.layout(batch), encoder.token_mask(batch)
        targets = self.target(batch, layout)
        subset = self.masking.draw(layout, len(targets), mask, model.generator(targets.device))
        if not subset.rest.shape[1]:
            rule = type(self.masking).__name__
            raise ConfigError(f"nothing of {layout.cells} cells is masked: let {rule} leave out more")
        codes = encoder(batch, keep=subset)
        predicted = model.decoder(codes, subset, mask).float()
        wanted = gather(targets, subset.rest)
        terms, real = self._terms(predicted, wanted), None if mask is None else mask.gather(1, subset.rest)
        metrics = {"accuracy": lambda: _mean((predicted.argmax(-1) == wanted).float(), real)}
        outputs = {"codes": codes, "prediction": predicted, "target": wanted, "subset": subset}
        return Losses({"reconstruction": _mean(terms, real)}, metrics if self.loss == "ce" else None, outputs)

    def _terms(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        if self.loss == "ce":
            return F.cross_entropy(predicted.transpose(1, 2), wanted, reduction="none")
        difference = predicted - wanted
        return (difference.square() if self.loss == "mse" else difference.abs()).mean(-1)


def _mean(values: Tensor, real: Tensor | None) -> Tensor:
    return values.mean() if real is None else (values * real).sum() / real.sum().clamp(min=1)
