"""Plain reconstruction: the objective of any autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from quire.contracts import Batch, Losses, Objective
from quire.errors import ConfigError
from quire.roles.latent.contract import PixelDecoder
from quire.roles.latent.noise import CoordinateNoise

if TYPE_CHECKING:
    from quire.model import Model


class Reconstruction(Objective):
    """Decode the encoder's codes and compare with the image.

    Args:
        rec: ``"mse"``, ``"l1"`` or ``"charbonnier"`` (the smooth l1, sqrt(d^2 + 1e-6)).
        corruption: A part such as ``CoordinateNoise`` on what the encoder sees; the clean data stay the target.

    Needs:
        encoder: any whose codes the decoder takes. decoder: PixelDecoder.

    Returns:
        ``reconstruct``: mean over pixels and batch. ``bottleneck``: the codes' own loss, where they have one.

    Raises:
        ConfigError: an unknown ``rec``.
    """

    decoder: PixelDecoder
    fields = ("image|vector",)

    def __init__(
        self, rec: Literal["mse", "charbonnier", "l1"] = "mse", corruption: CoordinateNoise | None = None
    ) -> None:
        super().__init__()
        if rec not in ("mse", "charbonnier", "l1"):
            raise ConfigError(f"Reconstruction.rec must be mse, charbonnier or l1, got {rec!r}")
        self.rec, self.corruption = rec, corruption

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Reconstruct digits from a code of ten."""
        model = {"encoder": "MlpVectorEncoder", "decoder": "MlpVectorDecoder", "objective": "Reconstruction"}
        return {"model": model, "data": "Digits"}

    def forward(self, model: Model, batch: Batch) -> Losses:
        """The terms of one batch."""
        name = "image" if "image" in batch else "vector"
        target: Tensor = batch[name]
        if self.corruption is not None:
            batch = {**batch, name: self.corruption(target, model.generator(target.device))}
        codes = model.encoder(batch)
        made = model.decoder.role(PixelDecoder)(codes)  # it may lie inside, in a PrototypeLayer for one
        terms = {"reconstruct": self._distance(made - target)}
        own = getattr(codes, "loss", None)
        return Losses(terms if own is None else {**terms, "bottleneck": own}, outputs={"reconstruction": made})

    def _distance(self, difference: Tensor) -> Tensor:
        if self.rec == "mse":
            return difference.square().mean()
        return difference.abs().mean() if self.rec == "l1" else torch.sqrt(difference.square() + 1e-6).mean()
