"""What all formats say about a dictionary, and the way from it to components and back."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.errors import ConfigError
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.jumprelu import JumpReLU
from quire.roles.sparse.selector import Selector
from quire.roles.sparse.selectors import BatchTopK, ReLU, TopK

TINY = 1e-30
"""Stands for a threshold of 0 or below, which a positive value passes anyway."""


@dataclass
class Weights:
    """One dictionary, row per latent.

    Attributes:
        W_enc: [F,D].
        W_dec: [F,D'].
        b_enc: [F] or None.
        b_dec: [D'] or None.
        selector: ``relu``, ``topk``, ``batchtopk`` or ``jumprelu``.
        k: Of topk and batchtopk.
        threshold: [F] of jumprelu; a scalar of batchtopk, below 0 while unset.
        subtract_bias: Whether b_dec is taken off the input.
        norm: ``none`` or ``layer``.
        transcoder: Whether it rebuilds another site than it reads.
        metadata: Plain values: model, site, notes.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor | None
    b_dec: Tensor | None
    selector: str
    k: int | None = None
    threshold: Tensor | None = None
    subtract_bias: bool = True
    norm: str = "none"
    transcoder: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)

    def check(self, where: object) -> Weights:
        """Itself, if the shapes agree. Raises ``ConfigError`` naming the file."""
        latents, width = self.W_enc.shape
        wanted: dict[str, tuple[int, ...]] = {"W_dec": (latents, self.W_dec.shape[1])}
        wanted |= {"b_enc": (latents,)} if self.b_enc is not None else {}
        wanted |= {"b_dec": (self.W_dec.shape[1],)} if self.b_dec is not None else {}
        wanted |= {"threshold": (latents,)} if self.selector == "jumprelu" else {}
        for name, shape in wanted.items():
            found = getattr(self, name)
            if found is None or tuple(found.shape) != shape:
                have = "missing" if found is None else f"{list(found.shape)}"
                raise ConfigError(f"{where}: {name} is {have}, W_enc [{latents}, {width}] asks for {list(shape)}")
        if self.selector in ("topk", "batchtopk") and not self.k:
            raise ConfigError(f"{where}: a {self.selector} dictionary must say its k")
        return self

    def without_bias_before(self) -> Weights:
        """The same function with b_dec folded into b_enc, for formats that never subtract it."""
        if not self.subtract_bias or self.b_dec is None:
            return self
        b_enc = -(self.W_enc @ self.b_dec) + (0 if self.b_enc is None else self.b_enc)
        return Weights(**{**self.__dict__, "b_enc": b_enc, "subtract_bias": False})


# ---- to components
def selector_of(weights: Weights) -> Selector:
    """The selector, with thresholds where it has some; not yet built."""
    if weights.selector == "relu":
        return ReLU()
    if weights.selector == "topk":
        return TopK(int(weights.k or 0))
    return BatchTopK(int(weights.k or 0)) if weights.selector == "batchtopk" else JumpReLU()


def spec_of(weights: Weights) -> dict[str, Any]:
    """Sizes to build the components with."""
    latents, width = weights.W_enc.shape
    spec: dict[str, Any] = {"width": width, "codes": {"width": latents, "latents": latents}}
    return {**spec, "target_width": weights.W_dec.shape[1]} if weights.transcoder else spec


@torch.no_grad()
def fill_encoder(encoder: SparseEncoder, weights: Weights) -> None:
    """Copy weights into a built encoder."""
    encoder.W_enc.copy_(weights.W_enc)
    if encoder.b_enc is not None:
        encoder.b_enc.copy_(weights.b_enc if weights.b_enc is not None else torch.zeros(()))
    if encoder.b_dec is not None and weights.b_dec is not None:
        encoder.b_dec.copy_(weights.b_dec)
    selector = encoder.selector
    if isinstance(selector, JumpReLU) and weights.threshold is not None:
        selector.log_threshold.copy_(weights.threshold.float().clamp(min=TINY).log())
    if isinstance(selector, BatchTopK) and weights.threshold is not None:
        selector.threshold.copy_(weights.threshold)


@torch.no_grad()
def fill_decoder(decoder: SparseDecoder, weights: Weights) -> None:
    """Copy weights into a built decoder."""
    decoder.W_dec.copy_(weights.W_dec)
    if decoder.b_dec is not None and weights.b_dec is not None:
        decoder.b_dec.copy_(weights.b_dec)


# ---- from components
@torch.no_grad()
def weights_of(encoder: SparseEncoder, decoder: SparseDecoder, metadata: dict[str, Any], where: str) -> Weights:
    """A built dictionary as ``Weights``; ``global_rms`` is folded in, so the file holds the same function.

    Raises:
        ConfigError: the selector has no equivalent in other projects' files.
    """
    selector, notes = encoder.selector, dict(metadata)
    name = selector.exports
    if name is None:
        raise ConfigError(
            f"{type(selector).__name__} has no equivalent in the format {where}: keep it as a Quire checkpoint"
        )
    core = {"relu": ReLU, "topk": TopK, "batchtopk": BatchTopK, "jumprelu": JumpReLU}[name]
    if type(selector) is not core:
        notes["note"] = f"trained with {type(selector).__name__}, written as {name}"
    inner = getattr(selector, "inner", selector)
    threshold = getattr(inner, "threshold", None)
    made = Weights(
        W_enc=encoder.W_enc.detach().clone(),
        W_dec=decoder.W_dec.detach().clone(),
        b_enc=None if encoder.b_enc is None else encoder.b_enc.detach().clone(),
        b_dec=None if decoder.b_dec is None else decoder.b_dec.detach().clone(),
        selector=name,
        k=getattr(inner, "k", None),
        threshold=None if threshold is None else threshold.detach().clone(),
        subtract_bias=encoder.b_dec is not None and encoder.target_width is None,
        norm="none" if encoder.norm == "global_rms" else encoder.norm,
        transcoder=encoder.target_width is not None,
        metadata=notes,
    )
    if encoder.b_dec is not None and encoder.target_width is not None:  # its own bias, not the decoder's
        bias = -(made.W_enc @ encoder.b_dec)
        made.b_enc = bias if made.b_enc is None else made.b_enc + bias
    if encoder.norm == "global_rms":
        scale = encoder.rms.scale.to(made.W_enc.dtype)
        out = scale if encoder.target_rms is None else encoder.target_rms.scale.to(scale.dtype)
        made.W_enc, made.W_dec = made.W_enc / scale, made.W_dec * out
        made.b_dec = None if made.b_dec is None else made.b_dec * out
    return made


# ---- files
def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ``ConfigError``."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is missing or no JSON") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds no JSON object")
    return content


def read_pickle(file: Path) -> dict[str, Tensor]:
    """Tensors of a ``.pt`` file; code in it is never run. Raises ``ConfigError``."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{file} holds pickled code, which Quire never runs: ask for a safetensors file") from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise ConfigError(f"{file} is missing, or no file of tensors") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds no tensors by name")
    return content


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises ``ConfigError``."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is missing or no safetensors file") from error


def take(tensors: dict[str, Tensor], name: str, where: object) -> Tensor:
    """One tensor. Raises ``ConfigError`` naming what there is."""
    if name not in tensors:
        raise ConfigError(f"{where} has no tensor {name}; it has {', '.join(sorted(tensors))}")
    return tensors[name]


def as_rows(matrix: Tensor, latents: int, width: int, name: str, where: object) -> Tensor:
    """A matrix as [F,D], whichever way it is stored; only a square one must be trusted.

    Raises:
        ConfigError: neither [F,D] nor [D,F].
    """
    if tuple(matrix.shape) == (latents, width):
        return matrix
    if tuple(matrix.shape) == (width, latents):
        return matrix.T.contiguous()
    raise ConfigError(f"{where}: {name} is {list(matrix.shape)}; {latents} latents of width {width} were said")
