"""The cube over a language model: which box a sentence has, and which sentence a point lies in. Celotti et al. 2020."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from quire.contracts import Codes, Role, Spec, build
from quire.errors import ConfigError
from quire.roles.language.contract import Caps, DecodeState, StepModel, device_of
from quire.roles.latent.contract import vector_of
from quire_ariel.codes import Sentences, VolumeCodes
from quire_ariel.encoding import Asked, encode
from quire_ariel.exact import Code
from quire_ariel.precision import evaluating, in_double
from quire_ariel.rows import Say
from quire_ariel.walking import ancestral, decode

DIGITS = {torch.float64: 52, torch.float32: 22, torch.bfloat16: 7, torch.float16: 10}
"""Bits of an axis that a point in [0, 1) of this type can tell apart."""
NOISE = 10
"""Bits of a type's precision that are left to a model's own rounding, with room to spare."""
DIFFERENT = 0.01
"""Bits by which a sentence's volume may differ between two passes of one model."""


class VolumeDecoder(StepModel):
    """Each sentence of a language model is a box in the cube [0, 1]^d, its volume the probability. Celotti et al. 2020.

    Token t cuts axis t mod d in proportion to the model's next-token probabilities, so every point lies in one box and
    decodes to its sentence. A uniform point decodes to exactly the model's own ancestral distribution: whatever variety
    random points show is the language model's. As a StepModel it is the language model inside.

    Args:
        language_model: Any StepModel that reads no source; its own encoder, if it has one, is not used.
        latent_dim: d, the number of axes.
        arithmetic: ``float64`` holds 52 bits an axis; ``exact`` any sentence, as whole numbers.
        frequency_bits: Probabilities are integers out of 2 to this many, so that encoding and decoding see the same.
        max_length: Most tokens of a decoded sentence, end token included.
        unfold: Decode by rescaling the point at each step, as the paper's code also does; for comparison, less exact.
        straight_through: Decoded tokens carry a gradient to the point, for networks that output points.
        clip: Move coordinates outside [0, 1] to the border instead of refusing them.

    Returns:
        ``forward(codes) -> Sentences`` of VectorCodes [B,d] or VolumeCodes; ``forward(None, tokens [B,T], mask [B,T])
        -> logits [B,T,V]``, the language model's.

    Raises:
        ConfigError: an argument out of range, or a language model without start or end token, or with a source.
        PointError: a point outside the cube, or of another width.
        CapacityError: a sentence that needs more bits than an axis holds.
        ZeroVolumeError: a sentence with a token of probability 0.
    """

    banned: Tensor

    def __init__(
        self,
        language_model: StepModel,
        latent_dim: int = 16,
        arithmetic: Literal["float64", "exact"] = "float64",
        frequency_bits: int = 24,
        max_length: int = 64,
        unfold: bool = False,
        straight_through: bool = False,
        clip: bool = False,
    ) -> None:
        super().__init__()
        if latent_dim < 1 or max_length < 1:
            raise ConfigError(
                f"VolumeDecoder needs latent_dim >= 1 and max_length >= 1, got {latent_dim} and {max_length}"
            )
        if not 8 <= frequency_bits <= 30:
            raise ConfigError(f"VolumeDecoder.frequency_bits must be in 8..30, got {frequency_bits}")
        if arithmetic not in ("float64", "exact"):
            raise ConfigError(f"VolumeDecoder.arithmetic is float64 or exact, got {arithmetic!r}")
        if arithmetic == "exact" and (unfold or straight_through):
            raise ConfigError("VolumeDecoder: unfold and straight_through need arithmetic: float64")
        self.language_model, self.latent_dim, self.arithmetic = language_model, latent_dim, arithmetic
        self.frequency_bits, self.max_length, self.unfold = frequency_bits, max_length, unfold
        self.straight_through, self.clip = straight_through, clip
        self.refer("owner", None)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Questions of the small grammar."""
        return tiny_volume()

    # ---- life
    def check(self, model: Any) -> None:
        """The language model must read tokens only."""
        if getattr(self.language_model, "crosses", False) is True:
            raise ConfigError(
                f"VolumeDecoder.language_model reads no source; {type(self.language_model).__name__} attends to one:"
                " use CausalLM, HFCausal or GRULanguageModel"
            )

    def build(self, spec: Spec) -> None:
        """Build the language model as one that stands alone: it does not read the codes of ``model.encoder``."""
        build(self.language_model, Spec({k: v for k, v in spec.items() if k != "codes"}))
        caps = self.language_model.caps()
        name = type(self.language_model).__name__
        if caps.start_id is None or not caps.eos_ids:
            what = "a start" if caps.start_id is None else "an end"
            raise ConfigError(f"VolumeDecoder needs {what} token; {name} has none: use a tokenizer that has one")
        if caps.vocab_size > 1 << self.frequency_bits:
            raise ConfigError(
                f"VolumeDecoder.frequency_bits={self.frequency_bits} has no room for {caps.vocab_size} tokens: raise it"
            )
        never = sorted({caps.pad_id, caps.start_id} - set(caps.eos_ids))
        self.register_buffer("banned", torch.tensor(never, dtype=torch.long), persistent=False)

    def bind(self, model: Any) -> None:
        """Errors show text where the model has a tokenizer."""
        super().bind(model)
        self.refer("owner", model)

    def role(self, role: type[Role]) -> Role | None:
        """Itself, or what the language model offers."""
        return self if isinstance(self, role) else self.language_model.role(role)

    # ---- the language model
    def caps(self) -> Caps:
        """The language model's."""
        return self.language_model.caps()

    def open(
        self, prompt: Tensor, mask: Tensor | None = None, codes: Codes | None = None, max_length: int | None = None
    ) -> DecodeState:
        """The language model's; ``codes`` are not for it."""
        return self.language_model.open(prompt, mask, None, max_length)

    def step(
        self,
        state: DecodeState,
        ids: Tensor | None,
        embeds: Tensor | None = None,
        parents: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """The language model's."""
        return self.language_model.step(state, ids, embeds, parents, valid)

    def keep(self, state: DecodeState, chosen: Tensor) -> None:
        """The language model's."""
        self.language_model.keep(state, chosen)

    def rows(self, state: DecodeState, order: Tensor) -> None:
        """The language model's."""
        self.language_model.rows(state, order)

    def cut(self, state: DecodeState, lengths: Tensor) -> None:
        """The language model's."""
        self.language_model.cut(state, lengths)

    def shallow(self, **how: Any) -> StepModel:
        """The language model's."""
        return self.language_model.shallow(**how)

    def embed(self, ids: Tensor) -> Tensor:
        """The language model's."""
        return self.language_model.embed(ids)

    def iter_layers(self) -> Sequence[Any]:
        """The language model's."""
        return self.language_model.iter_layers()

    # ---- the code
    def forward(
        self, codes: Codes | None, tokens: Tensor | None = None, mask: Tensor | None = None, **more: Any
    ) -> Any:
        """Without tokens: the sentences of ``codes``. With tokens: the language model's logits [B,T,V]."""
        if tokens is not None:
            return self.language_model(None, tokens, mask, **more)
        if codes is None:
            raise ConfigError("VolumeDecoder decodes points: give it codes, or tokens to score")
        return self.decode(codes)

    def encode(  # type: ignore[override]
        self, tokens: Any, mask: Tensor | None = None, add_eos: bool = False, differentiable: bool = False
    ) -> VolumeCodes | None:
        """The box of each sentence and a point in it, by one teacher-forced pass.

        Args:
            tokens: [B,T] int64, padded on either side, with or without the start token.
            mask: [B,T] bool, True = real; None: no padding.
            add_eos: Put the end token behind sentences that have none.
            differentiable: With gradients to the language model, in its own precision; for training only.
        """
        if isinstance(tokens, dict):
            return None  # as a StepModel: it reads no source
        if differentiable:
            return encode(self, tokens, mask, Asked(add_eos=add_eos, gradients=True))
        with self.reading():
            return encode(self, tokens, mask, Asked(add_eos=add_eos))

    def box(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Lower and upper corners [B,d] of sentences or of their beginnings, which need no end token."""
        with self.reading():
            found = encode(self, tokens, mask, Asked(ended=False, point=False))
        return found.low, found.high

    def log2_volume(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B] log2 of the probability of sentences or of their beginnings, however small."""
        with self.reading():
            return encode(self, tokens, mask, Asked(ended=False, point=False, bounded=False)).log2_volume

    def decode(self, points: Codes | Tensor | list[list[Code]]) -> Sentences:
        """The sentence that each point lies in, by cached steps in batch.

        Args:
            points: [B,d] floating, VectorCodes, VolumeCodes, or exact codes: for each sentence d pairs of numerator
                and bits.
        """
        kept, exact = None, None
        if isinstance(points, VolumeCodes):
            kept, exact, points = points.log2_volume, points.exact, points.z
        elif isinstance(points, Codes):
            points = vector_of(points, self)
        elif not isinstance(points, Tensor):
            exact, points = points, torch.empty(len(points), self.latent_dim)
        with self.reading(grad=self.straight_through):
            found = decode(self, points, exact)
        if kept is not None and not self.unfold:
            found.differs = (found.log2_volume - kept.to(found.log2_volume.device)).abs() > DIFFERENT
            if bool(found.differs.any()):
                warnings.warn(
                    f"sentence {int(found.differs.nonzero()[0])} has another probability than it was encoded with"
                    " (another model?), so it may be another sentence",
                    stacklevel=2,
                )
        return found

    def ancestral(self, count: int, generator: torch.Generator) -> Sentences:
        """The control of a uniform point: sample the same tables token by token. Draws are made on the CPU."""
        with self.reading():
            return ancestral(self, count, generator)

    def capacity_bits(self, dtype: torch.dtype = torch.float64) -> float:
        """Bits that one axis holds in points of ``dtype``; infinite where points are exact."""
        return math.inf if self.arithmetic == "exact" and dtype == torch.float64 else float(DIGITS.get(dtype, 1))

    def tolerance(self) -> float:
        """How near to a border a point may be while the model runs in its own precision; 2^-13 in float32.

        Batch, padding and cache change a float32 model's borders by about 2^-20.
        """
        own = next((p.dtype for p in self.language_model.parameters()), torch.float32)
        return min(1.0, torch.finfo(own).eps * 2**NOISE)

    @contextmanager
    def reading(self, grad: bool = False) -> Iterator[None]:
        """The language model in eval mode, without gradients unless asked for."""
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()), evaluating(self.language_model):
            yield

    @contextmanager
    def doubled(self) -> Iterator[None]:
        """The language model in float64: batch, padding and cache then don't change its tables."""
        with in_double(self.language_model):
            yield

    @property
    def device(self) -> torch.device:
        """Where the language model is."""
        return device_of(self.language_model)

    def speech(self) -> Say | None:
        """Ids → text, where the model has a tokenizer."""
        return getattr(getattr(self.__dict__["owner"], "tokenizer", None), "decode", None)


def tiny_volume(**parts: Any) -> dict[str, Any]:
    """Questions of the small grammar, a few hundred of them, on four axes."""
    language_model = {"class_path": "GRULanguageModel", "init_args": {"width": 16, "embedding": 8}}
    decoder = {"class_path": "VolumeDecoder", "init_args": {"language_model": language_model, "latent_dim": 4}}
    data = {"class_path": "QuestionGrammar", "init_args": {"sentences": 128, "held_out": 16, "batch_size": 16}}
    return {"model": {"decoder": decoder, "objective": "NextToken", "sampler": "UniformCube", **parts}, "data": data}
