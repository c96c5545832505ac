"""The decoder of a sparse dictionary: one row, a direction, per latent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from quire.contracts import Decoder, Spec
from quire.errors import ConfigError
from quire.roles.sparse.codes import SparseCodes
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.linear import DENSE_FROM, ByLatent, weighted_rows
from quire.roles.sparse.selector import tiny_run

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    from quire.model import Model


class SparseDecoder(Decoder):
    """Sparse codes to activations: the weighted sum of the active latents' rows, plus a bias.

    Its width is the data's, or that of the field ``target`` where the data has one (a transcoder).

    Args:
        bias: Have b_dec; an encoder that subtracts it shares it.
        unit_norm: Keep every row at norm 1 (``UnitNormRows``, which comes along).

    Returns:
        [N,D], or [B,T,D] for codes [B,T,K], in the units of the data.

    Raises:
        ConfigError: the encoder gives no sparse codes.
    """

    encoder: SparseEncoder
    b_dec: Tensor | None
    tokens_since_fired: Tensor

    def __init__(self, bias: bool = True, unit_norm: bool = True) -> None:
        super().__init__()
        self.bias, self.unit_norm = bias, unit_norm
        self.counted: int | None = None  # no counter is above it

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Planted features, TopK with k = 2."""
        return tiny_run({"class_path": "TopK", "init_args": {"k": 2}})

    # ---- life
    def build(self, spec: Spec) -> None:
        """Make W_dec [F,D], b_dec [D] and the counters [F]."""
        self.latents = int(spec.code("latents", self))
        self.width = int(spec.get("target_width") or spec.need("width", self))
        self.W_dec = nn.Parameter(normalize(torch.randn(self.latents, self.width), dim=1))
        self.b_dec = nn.Parameter(torch.zeros(self.width)) if self.bias else None
        self.register_buffer("tokens_since_fired", torch.zeros(self.latents, dtype=torch.long))

    def bind(self, model: Model) -> None:
        """Start at the encoder's rows and share the b_dec that it subtracts; loaded parts stay as they are."""
        encoder = None if model.encoder is None else model.encoder.role(SparseEncoder)
        if encoder is None or "origin" in self.__dict__ or "origin" in encoder.__dict__:
            return
        if encoder.W_enc.shape == self.W_dec.shape:
            with torch.no_grad():
                self.W_dec.copy_(normalize(encoder.W_enc, dim=1))
        if encoder.b_dec is not None and encoder.target_width is None:
            if not self.bias:
                raise ConfigError("subtract_bias needs the decoder's bias: set it to false, or decoder.bias to true")
            self.b_dec = encoder.b_dec

    def callbacks(self) -> list[Callback]:
        """``UnitNormRows`` where the rows are to stay unit."""
        from quire.roles.sparse.rows import UnitNormRows

        return [UnitNormRows()] if self.unit_norm and self.W_dec_moves else []

    @property
    def W_dec_moves(self) -> bool:
        """Whether W_dec is trained."""
        return not self.built or self.W_dec.requires_grad

    # ---- use
    def forward(self, codes: SparseCodes) -> Tensor:
        """Codes → [N,D] in the data's units."""
        return restored(codes, self.decode(codes))

    def decode(self, codes: SparseCodes, plan: ByLatent | None = None, bias: bool = True) -> Tensor:
        """[N,D] in normalised units.

        Args:
            codes: Rows [...,K] or dense [...,F].
            plan: The kept pairs by latent, if the caller has them sorted already.
            bias: Add b_dec.
        """
        made = self._sum(codes, plan)
        return made if self.b_dec is None or not bias else made + self.b_dec

    def _sum(self, codes: SparseCodes, plan: ByLatent | None) -> Tensor:
        if codes.indices is None or codes.indices.shape[-1] * DENSE_FROM > self.latents:
            return codes.dense() @ self.W_dec
        leading = codes.indices.shape[:-1]
        indices = codes.indices.reshape(-1, codes.indices.shape[-1])
        values = codes.values.reshape(indices.shape)
        return weighted_rows(values, self.W_dec, plan or ByLatent(indices, self.latents)).view(*leading, self.width)

    @property
    def norms(self) -> Tensor:
        """[F] norm of each row, in the graph."""
        return self.W_dec.norm(dim=1)

    def dead(self, window: int) -> Tensor:
        """[F] bool: latents that have not fired for ``window`` tokens."""
        return self.tokens_since_fired >= window

    def may_have_dead(self, window: int) -> bool:
        """Whether a latent can be dead yet, told from the tokens counted: the device is asked once at most."""
        if self.counted is None:
            self.counted = int(self.tokens_since_fired.max())
        return self.counted >= window


def restored(codes: SparseCodes, decoded: Tensor) -> Tensor:
    """Undo the normalisation that ``codes`` remember."""
    if codes.scale is not None:
        decoded = decoded * codes.scale
    return decoded if codes.shift is None else decoded + codes.shift
