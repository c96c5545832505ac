"""The loss term that pulls the code's norm towards the input's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from quire.contracts import Batch, Losses, Objective
from quire.errors import ConfigError
from quire.roles.sparse.codes import SparseCodes
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.rows import UnitNormRows, project, renormalise
from quire.roles.sparse.selector import tiny_run
from quire_topafa.selector import check_compat

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    from quire.model import Model


class AFALoss(Objective):
    """Pull each token's code to the norm of its input: mean (|f| - |x|)². Lee et al. 2025, arXiv 2503.24277.

    One term, for a ``Sum`` with SparseReconstruction; works with every selector. |f| is taken of z times the norm of
    its decoder row, |x| of x~ - b_dec, as TopAFA selects; norms of rows and b_dec are constants here.

    Args:
        weight: λ, 0 and up.
        compat: ``"official"`` takes plain |f| and |x~|, and renormalises decoder rows before each optimizer step in
            place of after it, as the official code; ``decoder.unit_norm`` must then be false.

    Needs:
        encoder: SparseEncoder. decoder: SparseDecoder.

    Returns:
        ``afa``: mean over tokens of the squared difference of norms, in squared normalised units.

    Raises:
        ConfigError: a weight below 0, an unknown compat, a transcoder, or official rows that the decoder keeps at 1.
    """

    encoder: SparseEncoder
    decoder: SparseDecoder
    fields = ("activation",)

    def __init__(self, weight: float = 1 / 32, compat: Literal["official"] | None = None) -> None:
        super().__init__()
        if weight < 0:
            raise ConfigError(f"AFALoss.weight must be at least 0, got {weight:g}")
        self.weight, self.compat = weight, check_compat(compat, "AFALoss")
        self.weights = {"afa": weight}

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Beside SparseReconstruction, with the selector of the paper."""
        objectives: list[Any] = [{"class_path": "SparseReconstruction"}, {"class_path": cls.__name__}]
        return tiny_run("TopAFA", {"class_path": "Sum", "init_args": {"objectives": objectives}})

    def check(self, model: Model) -> None:
        """Official rows must be free between steps."""
        decoder = model.decoder.role(SparseDecoder)
        if self.compat and decoder is not None and decoder.unit_norm:
            raise ConfigError(
                "AFALoss.compat: official renormalises rows before the step: set decoder.unit_norm: false"
            )

    def callbacks(self) -> list[Callback]:
        """Rows of norm 1 before each step, for ``compat: official``."""
        return [RowsBeforeStep()] if self.compat else []

    def forward(self, model: Model, batch: Batch) -> Losses:
        """The term, and how many latents tokens keep."""
        encoder, decoder = model.encoder.role(SparseEncoder), model.decoder.role(SparseDecoder)
        if encoder.target_width is not None:
            raise ConfigError("AFALoss compares a code with its input, but a transcoder rebuilds another site")
        reading = encoder.read(batch)
        codes, x = reading.codes, reading.x
        if self.compat:
            made, wanted = norm_of(codes.values), x.detach().norm(dim=1)
        else:
            bias = 0 if decoder.b_dec is None else decoder.b_dec.detach()
            made, wanted = norm_of(scaled(codes, decoder.norms.detach())), (x.detach() - bias).norm(dim=1)
        kept = codes.l0().float()
        metrics = {"l0_min": kept.min, "l0_mean": kept.mean, "l0_max": kept.max}
        metrics["norm_ratio"] = lambda: (made.detach() / wanted.clamp(min=1e-12)).mean()
        with torch.no_grad():
            outputs = {"codes": codes, "fired": codes.fired(), "tokens": len(x)}
        return Losses({"afa": (made - wanted).square().mean()}, metrics, outputs)


def scaled(codes: SparseCodes, norms: Tensor) -> Tensor:
    """Values [N,·] times the norm [F] of each latent's decoder row."""
    return codes.values * (norms if codes.indices is None else norms[codes.indices])


def norm_of(values: Tensor) -> Tensor:
    """[N] norms whose gradient stays finite at 0."""
    return (values.square().sum(-1) + 1e-12).sqrt()


class RowsBeforeStep(UnitNormRows):
    """Unit rows with projected gradients before each optimizer step; the step then leaves them a little off 1."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Project, then renormalise."""
        rows = pl_module.decoder.role(SparseDecoder).W_dec
        project(rows, rows.grad)
        renormalise(rows)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Nothing."""
