"""The bottleneck: a frozen encoder's features become the values of the nearest keys. Träuble et al. 2023."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.functional import normalize

from quire.contracts import Batch, Codes, Encoder, Spec, build
from quire.errors import ConfigError
from quire.roles.sparse.codes import SparseCodes
from quire.roles.sparse.ranks import ranks, sum_over_ranks
from quire.roles.tokens.contract import Tokens
from quire_dkvb.cache import Lookups, count, flat
from quire_dkvb.modules import bag, nearest, random_heads, softly


@dataclass
class ValueCodes(Codes):
    """Which keys each token fetched, and what is stored there.

    Attributes:
        indices: [B,N,C,k] int64.
        table: [C,M,V], all values.
        mask: [B,N] bool, True = real; None when all are.
        relaxed: [B,N,C,V], a soft lookup that lends its gradient where somebody differentiates by the features; else
            None.
    """

    indices: Tensor
    table: Tensor
    mask: Tensor | None = None
    relaxed: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """``values`` and ``indices``, and ``mask`` where there is one."""
        found = {"values": self.values, "indices": self.indices}
        return found if self.mask is None else {**found, "mask": self.mask}

    @property
    def values(self) -> Tensor:
        """[B,N,C,V]: what was fetched; the sum over the k keys of a codebook."""
        size, tokens, books, top = self.indices.shape
        values = bag(self._rows(), self._places().reshape(-1, top)).view(size, tokens, books, -1)
        return values if self.relaxed is None else values + self.relaxed - self.relaxed.detach()

    def vote(self) -> Tensor:
        """[B,V]: mean over codebooks and real tokens, nothing of [B,N,C,V] is made."""
        size, tokens, books, _ = self.indices.shape
        if self.relaxed is not None:
            return self.vector.unflatten(1, (books, -1)).mean(1)
        places = self._places().reshape(size, -1)
        if self.mask is None:
            return bag(self._rows(), places) / (tokens * books)
        weights = self.mask[:, :, None, None].expand_as(self.indices).reshape(size, -1)
        return bag(self._rows(), places, weights) / (books * self.mask.sum(1, keepdim=True).clamp(min=1))

    @property
    def vector(self) -> Tensor:
        """[B,C*V]: values of all codebooks side by side, mean over real tokens."""
        values = self.values.flatten(2)
        if self.mask is None:
            return values.mean(1)
        weight = self.mask[..., None].to(values.dtype)
        return (values * weight).sum(1) / weight.sum(1).clamp(min=1)

    def dense(self) -> Tensor:
        """``vector``."""
        return self.vector

    def _rows(self) -> Tensor:
        return self.table.flatten(0, 1)

    def _places(self) -> Tensor:
        return flat(self.indices, self.table.shape[1])


class KeyValueBottleneck(Encoder):
    """Discrete keys over any frozen encoder; only the values that a sample fetches are trained. Träuble et al. 2023.

    Features z [B,N,D] become C heads; each looks up the nearest of its codebook's M keys and fetches the value there.
    Keys come from data without labels (``KeyInit``, which it brings along) and then stay; the encoder is in eval mode,
    without gradients, whatever it was. No gradient passes the lookup.

    Args:
        encoder: Gives one vector a sample, tokens, latents, or sparse codes (taken as dense rows).
        codebooks: C.
        keys: M, a codebook.
        key_width: d, of a key and a head.
        value_width: V; null takes the number of classes, as ``CodebookVote`` needs it.
        heads: ``"random"``: fixed Gaussian maps with columns of unit length; ``"chunk"``: D cut into C pieces;
            ``"learned"``: random ones that ``KeyInit`` trains towards a small quantisation error, without labels.
        top_k: Keys fetched from each codebook.
        unused: In evaluation ``"exclude"`` the keys that training never used, or ``"keep"`` them.
        value_init: Values start at ``"zeros"`` (the paper's code), or ``"normal"``.
        cache: Keep each training sample's indices, so that later epochs run neither the encoder nor the lookup. Off by
            itself, with a line in the log, when training data are augmented.

    Returns:
        ValueCodes: indices [B,N,C,k], values [B,N,C,V], vector [B,C*V].

    Raises:
        ConfigError: sizes that don't fit, keys that were never initialised or never used, or another number of tokens
            than in training.

    Paper: Träuble, Goyal, Rahaman, Mozer, Kawaguchi, Bengio, Schölkopf, "Discrete Key-Value Bottleneck", ICML 2023,
    arXiv 2207.11240.
    """

    usage: Tensor
    ready: Tensor
    tokens: Tensor
    keys: Tensor
    R: Tensor
    values: nn.Parameter

    def __init__(
        self,
        encoder: Encoder,
        codebooks: int = 256,
        keys: int = 4096,
        key_width: int = 14,
        value_width: int | None = None,
        heads: Literal["random", "chunk", "learned"] = "random",
        top_k: int = 1,
        unused: Literal["exclude", "keep"] = "exclude",
        value_init: Literal["zeros", "normal"] = "zeros",
        cache: bool = True,
    ) -> None:
        super().__init__()
        sizes = {"codebooks": codebooks, "keys": keys, "key_width": key_width, "top_k": top_k}
        for name, size in {**sizes, "value_width": 1 if value_width is None else value_width}.items():
            if size < 1:
                raise ConfigError(f"KeyValueBottleneck.{name} must be at least 1, got {size}")
        if top_k > keys:
            raise ConfigError(f"KeyValueBottleneck.top_k is {top_k}, but a codebook has {keys} keys: lower it")
        words = {"heads": (heads, ("random", "chunk", "learned")), "unused": (unused, ("exclude", "keep"))}
        for name, (word, known) in {**words, "value_init": (value_init, ("zeros", "normal"))}.items():
            if word not in known:
                raise ConfigError(f"KeyValueBottleneck.{name} must be {' or '.join(known)}, got {word!r}")
        self.encoder, self.codebooks, self.count, self.key_width = encoder, codebooks, keys, key_width
        self.value_width, self.heads, self.top_k = value_width, heads, top_k
        self.unused, self.value_init, self.cache = unused, value_init, cache
        self.input = nn.Identity()
        self.checking = self._ready = False
        self._tokens = 0
        self.refer("lookups", None)
        self.refer("own", None)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Sixteen codebooks on raw pixels of digits."""
        return tiny_run()

    # ---- life
    def build(self, spec: Spec) -> None:
        """R [D,C,d], keys [C,M,d], values [C,M,V], and how often each key was used."""
        build(self.encoder, spec)
        self.encoder.requires_grad_(False)
        self.encoder.frozen = True
        self.encoder.eval()
        self.feature_width = width = int(self.encoder.sizes()["width"])
        books, size, classes = self.codebooks, self.key_width, spec.get("classes")
        if self.heads == "chunk" and width != books * size:
            raise ConfigError(
                f"heads: chunk cuts {width} features into codebooks x key_width = {books} x {size} = {books * size}: "
                "change one of the two, or use heads: random"
            )
        if self.value_width is None:
            self.value_width = int(spec.need("classes", self))
        if classes is not None and self.count < classes:
            rank_zero_warn(
                f"{self.count} keys a codebook for {classes} classes: classes must share keys and overwrite each "
                "other, raise KeyValueBottleneck.keys"
            )
        if self.heads != "chunk":
            self.register_buffer("R", random_heads(width, books, size))
        self.register_buffer("keys", torch.randn(books, self.count, size))
        self.values = nn.Parameter(torch.zeros(books, self.count, self.value_width))
        if self.value_init == "normal":
            nn.init.normal_(self.values)
        self.register_buffer("usage", torch.zeros(books, self.count, dtype=torch.long))
        self.register_buffer("ready", torch.tensor(False))
        self.register_buffer("tokens", torch.tensor(0))
        self.register_state_dict_pre_hook(_settled)

    def callbacks(self) -> list[Callback]:
        """Phase 1, which a listed ``KeyInit`` replaces, and what runs beside phase 2."""
        from quire_dkvb.keys import KeyInit
        from quire_dkvb.watching import BesideBottleneck

        return [KeyInit(), BesideBottleneck()]

    def sizes(self) -> dict[str, Any]:
        """``width`` of all values side by side, ``codebooks`` and ``value_width``."""
        assert self.value_width is not None
        return {
            "width": self.codebooks * self.value_width,
            "codebooks": self.codebooks,
            "value_width": self.value_width,
        }

    # ---- use
    def forward(self, batch: Batch) -> ValueCodes:
        """Batch → ValueCodes."""
        if not self._ready:  # asked once: reading a buffer waits for the GPU
            self._ready = bool(self.ready)
            if not self._ready:
                raise ConfigError("keys were never initialised: add the KeyInit callback or load a checkpoint")
        if self.training and self.lookups is not None:
            indices = self.lookups.get(batch["index"])
            if indices is not None:
                return ValueCodes(indices, self.values)
        features, mask = self.read(batch)
        self._check_tokens(features.shape[1], mask)
        indices = self.look(features, None if self.training else self.allowed())
        if self.training:
            count(self._counts(), indices, mask)
            if self.lookups is not None and mask is None:
                self.lookups.put(batch["index"], indices)
        relaxed = None
        if features.requires_grad and torch.is_grad_enabled():  # no training: somebody studies the frozen features
            relaxed = softly(self.project(features.flatten(0, 1)), self.keys, self.values)
            relaxed = relaxed.unflatten(0, features.shape[:2])
        return ValueCodes(indices, self.values, mask, relaxed)

    def read(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The frozen features [B,N,D] and which are real, [B,N] or None. Their site's name is ``input``.

        Raises:
            ConfigError: codes without vectors, tokens, latents or sparse rows.
        """
        features, mask = rows_of(self.encoder(batch), batch, self.encoder)
        return self.input(features), mask

    def project(self, features: Tensor) -> Tensor:
        """[n,D] → heads [n,C,d], float32 whatever the run's precision."""
        with torch.autocast(features.device.type, enabled=False):
            if self.heads == "chunk":
                return features.float().unflatten(-1, (self.codebooks, self.key_width))
            return (features.float() @ self.R.flatten(1)).unflatten(-1, (self.codebooks, self.key_width))

    def look(self, features: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Features [B,N,D] → indices [B,N,C,k]; ``allowed`` [C,M] leaves keys out."""
        with torch.no_grad():
            found = nearest(self.project(features.flatten(0, 1)), self.keys, self.top_k, allowed)
        return found.unflatten(0, features.shape[:2])

    def allowed(self) -> Tensor | None:
        """Keys that evaluation may fetch, [C,M] bool; None for all.

        Raises:
            ConfigError: none was ever used.
        """
        if self.unused == "keep" or self.checking:
            return None
        self.settle()
        used = self.usage > 0
        if not bool(used.any()):
            raise ConfigError("no key was ever used in training: train the values first, or set unused: keep")
        return used

    def _check_tokens(self, found: int, mask: Tensor | None) -> None:
        if mask is not None:  # padded to the batch
            return
        if not self._tokens:
            self._tokens = int(self.tokens)
        if self.training and not self._tokens:
            self.tokens.fill_(found)
            self._tokens = found
        if self._tokens and found != self._tokens:
            raise ConfigError(
                f"the bottleneck was trained on {self._tokens} tokens a sample, this batch has {found}: give the data "
                "the same size, or pool the encoder"
            )

    # ---- phase 1 and what runs beside phase 2
    def initialised(self, keys: Tensor, heads: Tensor | None = None) -> None:
        """Take ``keys`` [C,M,d], and ``heads`` R, and start counting anew."""
        self.keys.copy_(keys)
        if heads is not None:
            self.R.copy_(normalize(heads, dim=0))
        self.usage.zero_()
        self.ready.fill_(True)
        self._ready = True

    def remember(self, samples: int | None) -> None:
        """Keep indices of this many training samples from now on; None forgets them."""
        self.settle()
        self.refer("lookups", None if samples is None else Lookups(samples, self.count))

    def settle(self) -> None:
        """Bring ``usage`` up to date with what the cache handed out."""
        if self.lookups is not None and self.lookups.pending:
            self.lookups.settle(self._counts())

    def gather(self) -> None:
        """Bring ``usage`` up to date with all processes; every one must call it."""
        self.settle()
        if ranks() > 1:
            self.usage.add_(sum_over_ranks(self._counts()))
            self.own.zero_()

    def _counts(self) -> Tensor:
        if ranks() == 1:
            return self.usage
        if self.own is None:  # no buffer: DDP would overwrite it with the first process'
            self.refer("own", torch.zeros_like(self.usage))
        return self.own

    lookups: Any
    own: Any


def _settled(module: nn.Module, *_: Any) -> None:
    assert isinstance(module, KeyValueBottleneck)
    module.settle()


def rows_of(codes: Codes, batch: Batch, asker: object) -> tuple[Tensor, Tensor | None]:
    """Any codes as [B,N,D], and which of the N are real, [B,N] or None.

    Raises:
        ConfigError: codes of another kind.
    """
    if isinstance(codes, Tokens):
        return codes.values, codes.mask if codes.padded else None
    if isinstance(codes, SparseCodes):
        dense, mask = codes.dense(), batch.get("mask")
        if dense.ndim == 2:
            return dense[:, None], None
        ragged = mask is not None and mask.shape == dense.shape[:2] and not bool(mask.all())
        return dense, mask if ragged else None
    vector, latents = getattr(codes, "vector", None), getattr(codes, "latents", None)
    if isinstance(vector, Tensor):
        return vector[:, None], None
    if isinstance(latents, Tensor):
        return latents, None
    raise ConfigError(
        f"KeyValueBottleneck needs vectors, tokens, latents or sparse codes; {type(asker).__name__} gives "
        f"{type(codes).__name__}"
    )


def tiny_run(**model: Any) -> dict[str, Any]:
    """A small bottleneck on raw pixels of digits, one class after the other."""
    given = {"encoder": "FlatPixels", "codebooks": 16, "keys": 16, "key_width": 4}
    whole = {
        "encoder": {"class_path": "KeyValueBottleneck", "init_args": given},
        "decoder": "CodebookVote",
        "objective": {"class_path": "Classify", "init_args": {"label_smoothing": 0.1}},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.3}},
        "schedule": "Constant",
    }
    return {"model": {**whole, **model}, "data": {"class_path": "Digits", "init_args": {"train_samples": 256}}}
