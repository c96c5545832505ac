"""The encoder of a sparse dictionary: normalise, project, select."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from quire.contracts import Batch, Encoder, Spec, build
from quire.errors import ConfigError, DataError
from quire.roles.sparse.codes import SparseCodes
from quire.roles.sparse.linear import DENSE_FROM, ByLatent, kept_values
from quire.roles.sparse.normalise import GlobalRms, check_norm, layer
from quire.roles.sparse.selector import Selection, Selector, tiny_run

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    from quire.model import Model
    from quire.roles.sparse.decoder import SparseDecoder

INITS = ("median", "zeros", "kaiming")


@dataclass
class Reading:
    """A batch as the encoder sees it; what objectives work on.

    Attributes:
        codes: The selected latents, rows [N,·].
        x: [N,D] normalised input x~.
        z: [N,F] activations of all latents, without a graph on the sparse path.
        context: What the selector saw.
        plan: The kept pairs by latent on the sparse path, else None.
    """

    codes: SparseCodes
    x: Tensor
    z: Tensor
    context: Selection
    plan: ByLatent | None


class SparseEncoder(Encoder):
    """Activations to sparse codes: relu of one linear layer, of which a selector keeps few.

    Args:
        latents: F, the size of the dictionary.
        selector: Which latents of a token are kept; its default is TopK with k = 32.
        subtract_bias: Take the decoder's bias off the input first; the two are then one parameter.
        encoder_bias: Have a bias per latent.
        norm: ``"none"``; ``"layer"``, each token to mean 0 and deviation 1, undone by the decoder; ``"global_rms"``,
            one scalar fitted on the first 100,000 training rows so that the mean squared norm is D.
        init: ``"median"``: random unit rows, the same in both matrices, and the decoder's bias at the geometric median
            of the first batch; ``"zeros"``: as that with the bias at 0; ``"kaiming"``: uniform rows here, the same of
            unit norm in the decoder, biases 0.

    Returns:
        SparseCodes: values [N,K] and indices [N,K], or dense values [N,F]. Activations [B,T,D] give [B,T,K].

    Raises:
        ConfigError: a size below 1, an unknown ``norm`` or ``init``, or activations of another width.
        DataError: a batch without a token.
    """

    fields = ("activation",)
    b_dec: Tensor | None
    b_enc: Tensor | None
    model: Model | None
    paired: SparseDecoder | None
    _shared: Any

    def __init__(
        self,
        latents: int,
        selector: Selector | None = None,
        subtract_bias: bool = True,
        encoder_bias: bool = True,
        norm: Literal["none", "layer", "global_rms"] = "none",
        init: Literal["median", "zeros", "kaiming"] = "median",
    ) -> None:
        super().__init__()
        if latents < 1:
            raise ConfigError(f"SparseEncoder.latents must be at least 1, got {latents}")
        if init not in INITS:
            raise ConfigError(f"SparseEncoder.init must be {', '.join(INITS)}, got {init!r}")
        if selector is None:
            from quire.roles.sparse.selectors import TopK

            selector = TopK(32)
        self.latents, self.selector = latents, selector
        self.subtract_bias, self.encoder_bias, self.init = subtract_bias, encoder_bias, init
        self.norm = check_norm(norm)
        self.refer("model", None)
        self.refer("paired", None)
        self.refer("_shared", None)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Planted features, TopK with k = 2."""
        return tiny_run({"class_path": "TopK", "init_args": {"k": 2}})

    # ---- life
    def build(self, spec: Spec) -> None:
        """Make W_enc [F,D], b_enc [F], b_dec [D] and what the selector needs."""
        self.width = int(spec.need("width", self))
        self.target_width = spec.get("target_width")
        if self.norm == "layer" and self.width < 2:
            raise ConfigError(f"norm: layer needs a width of at least 2, got {self.width}: use norm: none")
        if self.norm == "layer" and self.target_width is not None:
            raise ConfigError("norm: layer can't be undone on another site's target: use norm: global_rms or none")
        self.W_enc = nn.Parameter(torch.empty(self.latents, self.width))
        self.b_enc = nn.Parameter(torch.zeros(self.latents)) if self.encoder_bias else None
        self.b_dec = nn.Parameter(torch.zeros(self.width)) if self.subtract_bias else None
        if self.init == "kaiming":
            nn.init.kaiming_uniform_(self.W_enc, a=1)
        else:
            with torch.no_grad():
                self.W_enc.copy_(normalize(torch.randn(self.latents, self.width), dim=1))
        if self.norm == "global_rms":
            self.rms = GlobalRms()
            self.target_rms = GlobalRms() if self.target_width is not None else None
        build(self.selector, Spec({**spec, "latents": self.latents}))

    def bind(self, model: Model) -> None:
        """Know the decoder, whose rows selectors may read."""
        from quire.roles.sparse.decoder import SparseDecoder

        super().bind(model)
        self.refer("model", model)
        self.refer("paired", model.decoder.role(SparseDecoder) if model.decoder is not None else None)

    def sizes(self) -> dict[str, Any]:
        """``width`` and ``latents``: F."""
        return {"width": self.latents, "latents": self.latents}

    def callbacks(self) -> list[Callback]:
        """The start of the decoder's bias, for ``init: median``."""
        from quire.roles.sparse.start import StartBias

        return [StartBias()] if self.init == "median" and "origin" not in self.__dict__ else []

    # ---- use
    def forward(self, batch: Batch) -> SparseCodes:
        """Activation [N,D] or [B,T,D] → codes."""
        return self.read(batch).codes.unflatten(tuple(batch["activation"].shape[:-1]))

    def encode(self, activation: Tensor, batch: Batch | None = None) -> SparseCodes:
        """Codes of activations [...,D] that are in no batch, such as a subject's at a site."""
        return self({**(batch or {}), "activation": activation})

    def read(self, batch: Batch) -> Reading:
        """The codes with everything that led to them; tokens of [B,T,D] become N rows.

        Objectives of a ``Sum`` that read the same batch in a training step share one reading.
        """
        if not (self.training and torch.is_grad_enabled()):
            return self._read(batch)
        seen = batch["activation"]
        key = (id(batch), id(seen), seen._version, self.W_enc._version)
        if self._shared is None or self._shared[0] != key:
            reading = self._read(batch)
            self.refer("_shared", (key, reading, batch))  # the batch too, so that its id stays its own
            if reading.codes.values.requires_grad:
                reading.codes.values.register_hook(self._forget)
        return self._shared[1]

    def _forget(self, gradient: Tensor) -> None:
        self.refer("_shared", None)  # the graph is used up

    def _read(self, batch: Batch) -> Reading:
        x, shift, scale = self.normalised(batch)
        u = x if self.b_dec is None else x - self.b_dec
        keeps = self.selector.keeps
        sparse = keeps is not None and keeps * DENSE_FROM <= self.latents
        graph = torch.is_grad_enabled()
        with torch.set_grad_enabled(graph and not sparse):
            pre = self.project(u)
            z = pre.relu() if self.selector.needs_pre or not sparse else pre.relu_()
            context = self._context(x, u, pre, scale, batch, self.training and graph)
            codes = self.selector.select(z, context)
        plan = None
        if sparse and codes.indices is not None:
            codes = codes.replace(nested=tuple(self.attached(x, n)[0] for n in codes.nested))
            codes, plan = self.attached(x, codes)
        undo = {"shift": shift, "scale": self._undo(x, scale)}
        codes = codes.replace(**undo, nested=tuple(n.replace(**undo) for n in codes.nested))
        return Reading(codes, x, z, context, plan)

    def normalised(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(x~ [N,D], shift [N,1] or None, scale [N,1] or None) of the batch's activations.

        Raises:
            ConfigError: another width than the encoder was built for.
            DataError: no tokens.
        """
        rows = self.checked(batch["activation"])
        if self.norm == "layer":
            return layer(rows)
        if self.norm == "none":
            return rows, None, None
        if self.training and torch.is_grad_enabled():
            self.fit_norm(batch)
        scale = self.rms.scale.to(rows.dtype)
        return rows / scale, None, scale.expand(len(rows), 1)

    def fit_norm(self, batch: Batch) -> None:
        """Let ``global_rms`` see a training batch."""
        self.rms.fit(self.checked(batch["activation"]))
        if self.target_rms is not None:
            self.target_rms.fit(batch["target"].reshape(-1, batch["target"].shape[-1]))

    def forget_norm(self) -> None:
        """Let ``global_rms`` start anew."""
        self.rms.forget()
        if self.target_rms is not None:
            self.target_rms.forget()

    def checked(self, rows: Tensor) -> Tensor:
        """Activations as [N,D] in the weights' precision."""
        if rows.shape[-1] != self.width:
            raise ConfigError(
                f"SparseEncoder was built for width {self.width}; batch field 'activation' has width {rows.shape[-1]}"
            )
        rows = rows.reshape(-1, self.width)
        if not len(rows):
            raise DataError("the batch has no tokens: its field 'activation' is empty")
        return rows.to(self.W_enc.dtype)

    def target(self, batch: Batch, x: Tensor) -> Tensor:
        """[N,D'] what the decoder rebuilds, normalised: the field ``target`` where the data has one, else ``x``."""
        if self.target_width is None:
            return x
        rows = batch["target"].reshape(-1, self.target_width).to(self.W_enc.dtype)
        if self.norm == "none":
            return rows
        assert self.target_rms is not None
        return rows / self.target_rms.scale.to(rows.dtype)

    def project(self, u: Tensor) -> Tensor:
        """[N,F] pre-activations, never below float32: half precision ties, and ties are selected by place."""
        if not torch.is_autocast_enabled(u.device.type):
            return linear(u, self.W_enc, self.b_enc)
        half = torch.get_autocast_dtype(u.device.type)
        with torch.autocast(u.device.type, enabled=False):
            if u.is_cuda and not torch.is_grad_enabled():  # half-precision factors, float32 sums
                made = torch.mm(u.to(half), self.W_enc.to(half).T, out_dtype=torch.float32)
                return made if self.b_enc is None else made.add_(self.b_enc)
            return linear(u.float(), self.W_enc.float(), None if self.b_enc is None else self.b_enc.float())

    def attached(self, x: Tensor, codes: SparseCodes) -> tuple[SparseCodes, ByLatent]:
        """Codes whose values have this encoder's gradient, and their pairs by latent."""
        assert codes.indices is not None
        plan = ByLatent(codes.indices, self.latents)
        return codes.replace(values=kept_values(x, self.b_dec, self.W_enc, self.b_enc, codes.values, plan)), plan

    def _context(
        self, x: Tensor, u: Tensor, pre: Tensor, scale: Tensor | None, batch: Batch, training: bool
    ) -> Selection:
        rows = None if self.paired is None else self.paired.W_dec.detach()
        return Selection(
            x=x.detach(),
            u=u.detach(),
            pre=pre if self.selector.needs_pre else None,
            batch=batch,
            training=training,
            decoder_rows=rows,
            scale=scale,
            model=self.model,
            asker=type(self.selector).__name__,
        )

    def _undo(self, x: Tensor, scale: Tensor | None) -> Tensor | None:
        if self.target_width is None or self.norm == "none":
            return scale
        assert self.target_rms is not None
        return self.target_rms.scale.to(x.dtype).expand(len(x), 1)
