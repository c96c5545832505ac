"""Another paper's latent space as the data: a trained encoder's codes become the field ``vector``."""

from __future__ import annotations

import tempfile
from typing import Any, ClassVar

import torch
from torch import Tensor

from quire.contracts import Batch, Decoder, Encoder, Spec, build
from quire.data import Transform
from quire.errors import ConfigError
from quire.roles.latent import PixelDecoder, VectorCodes, VectorEncoder, need_vectors
from quire.roles.latent.pca import PCAEncoder

DATA = ("image_size", "channels", "width")


class LatentField(Transform):
    """Replace what an encoder reads by its codes, so that a density is learnt over them. After Alain and Bengio 2012.

    The encoder is frozen. It stands in ``data.transforms``, belongs to the data, and is not in the model's checkpoint.

    Args:
        encoder: A VectorEncoder, as a rule ``Pretrained``.
        decoder: Turns codes back into data, for pictures of chains; null: none, but principal components have an
            inverse of their own.

    Returns:
        The batch with ``vector`` [B,D] in the place of the fields that the encoder reads.

    Raises:
        ConfigError: an encoder without vector codes.
    """

    training_only: ClassVar[bool] = False

    def __init__(self, encoder: Encoder, decoder: Decoder | None = None) -> None:
        super().__init__()
        need_vectors(encoder, self)
        self.encoder, self.decoder = encoder, decoder
        self.requires_grad_(False).eval()

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """The codes of a small encoder of digits, exported to a temporary folder."""
        from quire.checkpoint import export
        from quire.model import Model
        from quire.recipe import instantiate
        from quire_dae_score.modules import tiny_run

        model = Model(
            encoder=instantiate({"class_path": "MlpVectorEncoder"}), spec={"image_size": [8, 8], "channels": 1}
        )
        model.configure_model()
        encoder = {"class_path": "Pretrained", "init_args": {"path": str(export(model, tempfile.mkdtemp()))}}
        field = {"class_path": "LatentField", "init_args": {"encoder": encoder}}
        data = {"class_path": "Digits", "init_args": {"transforms": [field], "train_samples": 256}}
        return {**tiny_run({"residual": False}), "data": data}

    # ---- what the model sees
    def offers(self, fields: tuple[str, ...]) -> tuple[str, ...]:
        """``vector`` instead of what the encoder reads."""
        return tuple(dict.fromkeys([*(f for f in fields if f not in self._read()), "vector"]))

    def resize(self, spec: Spec) -> Spec:
        """The code's width instead of the sizes of the data."""
        build(self.encoder, spec)
        self.encoder.requires_grad_(False).eval()
        width = self._encoder().width
        if self.decoder is not None:
            build(self.decoder, Spec({**spec, "codes": self.encoder.sizes()}))
            self.decoder.requires_grad_(False).eval()
        return Spec({**{k: v for k, v in spec.items() if k not in DATA}, "width": width})

    def train(self, mode: bool = True) -> LatentField:
        """It stays in eval mode."""
        super().train(False)
        return self

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> Batch:
        """The batch with codes in it."""
        where = next((v.device for v in batch.values() if isinstance(v, Tensor)), torch.device("cpu"))
        self.to(where)
        with torch.no_grad():
            vector = self._encoder()(batch).vector
        return {**{k: v for k, v in batch.items() if k not in self._read()}, "vector": vector}

    # ---- back
    @torch.no_grad()
    def decode(self, vector: Tensor) -> Tensor | None:
        """Codes [B,D] as data, or None when nothing turns them back."""
        if self.decoder is not None:
            self.decoder.to(vector.device)
            return (self.decoder.role(PixelDecoder) or self.decoder)(VectorCodes(vector))
        encoder = self._encoder()
        return encoder.to(vector.device).inverse(vector) if isinstance(encoder, PCAEncoder) else None

    def _encoder(self) -> VectorEncoder:
        found = self.encoder.role(VectorEncoder)
        if found is None:
            raise ConfigError(f"LatentField needs a VectorEncoder, got {type(self.encoder).__name__}")
        return found

    def _read(self) -> set[str]:
        inside = [m for m in self.encoder.modules() if hasattr(m, "fields")]
        return {name for part in inside for field in part.fields for name in field.split("|")}
