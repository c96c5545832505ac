"""Sentences as boxes, in the encoder's place, by the decoder's language model: there is one. Celotti et al. 2020."""

from __future__ import annotations

from typing import Any

import torch

from quire.contracts import Batch
from quire.errors import ConfigError
from quire.roles.latent.contract import VectorEncoder
from quire_ariel.codes import VolumeCodes
from quire_ariel.decoder import VolumeDecoder


class VolumeEncoder(VectorEncoder):
    """Each sentence's box in the cube of ``model.decoder``, a point in it, and its volume. Celotti et al. 2020.

    It has no weights: the language model is the VolumeDecoder's. Points are exact in evaluation; in training they carry
    gradients to the language model and are as exact as its own precision.

    Args:
        add_eos: Put the end token behind sentences that have none, such as rows that were cut.

    Needs:
        decoder: VolumeDecoder, or a part that holds one. Field: tokens.

    Returns:
        VolumeCodes: vector [B,d] float32, z, low and high [B,d] float64, log2_volume [B].

    Raises:
        ConfigError: no VolumeDecoder in the model.
        CapacityError: a sentence that needs more bits than an axis holds.
        ZeroVolumeError: a sentence with a token of probability 0.
    """

    decoder: VolumeDecoder
    fields = ("tokens",)

    def __init__(self, add_eos: bool = True) -> None:
        super().__init__()
        self.add_eos = add_eos

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Questions of the small grammar, four axes."""
        from quire_ariel.decoder import tiny_volume

        run = tiny_volume(encoder="VolumeEncoder")
        del run["model"]["sampler"]
        return run

    def check(self, model: Any) -> None:
        """Know the width before anything is built."""
        self.width = _cube(model).latent_dim

    def bind(self, model: Any) -> None:
        """Find the cube."""
        self.refer("cube", _cube(model))

    def forward(self, batch: Batch) -> VolumeCodes:
        """Tokens [B,T] → boxes in [0, 1]^d."""
        cube: VolumeDecoder = self.__dict__["cube"]
        gradients = self.training and torch.is_grad_enabled()
        found = cube.encode(batch["tokens"], batch.get("mask"), self.add_eos, gradients)
        assert found is not None
        return found


def _cube(model: Any) -> VolumeDecoder:
    found = None if model.decoder is None else model.decoder.role(VolumeDecoder)
    if found is None:
        raise ConfigError("VolumeEncoder needs a VolumeDecoder; set model.decoder to one")
    return found
