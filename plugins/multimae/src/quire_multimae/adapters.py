"""Input adapters: what one modality looks like and how its patches become tokens. Bachmann et al. 2022."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quire.contracts import Batch, Part, Spec
from quire.errors import ConfigError, DataError
from quire.roles.tokens.contract import Segment
from quire.roles.tokens.patches import pair, patchify, unpatchify

Numbers = float | list[float]


class ModalityAdapter(Part):
    """One modality: its field, its grid, its patches, and the map from a patch to a token.

    As an encoder's input it is built and has parameters; as an output of a decoder it only describes.

    Attributes:
        name: Name of the modality; the batch field too, unless ``field`` says another.
        classes: Number of classes for maps of ids, 0 for numbers.
        values: Numbers, or logits, in one patch. Known once described.
    """

    name = "image"
    width = 0
    classes = 0
    values = 0

    def __init__(self, patch: int | list[int], stride_level: int, field: str | None) -> None:
        super().__init__()
        self.full = pair(patch, "patch")
        if stride_level < 1 or self.full[0] % stride_level or self.full[1] % stride_level:
            raise ConfigError(f"patch {patch} is not divisible by stride_level {stride_level}")
        self.stride, self.given_field = stride_level, field
        self.patch = (self.full[0] // stride_level, self.full[1] // stride_level)

    def named(self, name: str, width: int = 0) -> ModalityAdapter:
        """This adapter, told its modality and the width of the tokens it makes."""
        self.name, self.width = name, width
        return self

    @property
    def field(self) -> str:
        """The batch field that it reads."""
        return self.given_field or self.name

    # ---- what a subclass writes
    def describe(self, spec: Spec) -> None:
        """Learn sizes from the data; no parameters."""
        raise NotImplementedError

    def resolved(self) -> dict[str, Any]:
        """``{"class_path", "init_args"}`` with everything that was learned from the data."""
        raise NotImplementedError

    def patches(self, value: Tensor) -> Tensor:
        """Checked field → [B,N,F]: normalised numbers, or int64 ids."""
        raise NotImplementedError

    def picture(self, predicted: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Predictions [B,N,values] → the field's own form: numbers [B,C,H,W], or ids [B,H,W]."""
        raise NotImplementedError

    # ---- places
    def said(self, spec: Spec) -> dict[str, Any]:
        """What the data says about this modality."""
        modalities = spec.get("modalities") or {}
        return dict(modalities.get(self.field) or modalities.get(self.name) or {})

    def size(self, source: Batch | Spec) -> tuple[int, int]:
        """Height and width of the field, in its own cells. Raises ``ConfigError`` when the spec has no size."""
        if not isinstance(source, Spec):
            return int(source[self.field].shape[-2]), int(source[self.field].shape[-1])
        said = self.said(source).get("size")
        if said is not None:
            return pair(said, f"the size of {self.name}")
        height, width = pair(source.need("image_size", self), "image_size")
        if height % self.stride or width % self.stride:
            raise ConfigError(f"{height}x{width} is not divisible by stride_level {self.stride} of {self.name}")
        return height // self.stride, width // self.stride

    def segment(self, source: Batch | Spec) -> Segment:
        """Its grid. Raises ``ConfigError`` when the patch doesn't divide the field."""
        height, width = self.size(source)
        if height % self.patch[0] or width % self.patch[1]:
            same = self.patch[0] == self.patch[1]
            patch = str(self.patch[0]) if same else f"{self.patch[0]}x{self.patch[1]}"
            raise ConfigError(f"{self.name} {height}x{width} is not divisible by patch {patch}: pad or resize it")
        grid = (height // self.patch[0], width // self.patch[1])
        return Segment(self.name, grid, self.patch, self.field)


class PatchAdapter(ModalityAdapter):
    """Patches of numbers (pixels, depth, edges, a spectrogram) → tokens by one linear map. Bachmann et al. 2022.

    It reads [B,C,H,W], or [B,H,W] as one channel. Its bias acts as an embedding of the modality.

    Args:
        patch: Patch size in pixels of the full picture, one number or [height, width].
        stride_level: Full pixels per cell of this field; 4 for a field stored at a quarter of the size.
        mean: Subtracted before anything else, one number or one a channel, in the field's unit; losses and
            predictions are in the normalised unit.
        std: Divided by after that, in the field's unit.
        channels: Channels of the field; null takes them from the data.
        field: Batch field; null is the modality's name.

    Raises:
        ConfigError: a stride that doesn't divide the patch, sizes that don't divide, unknown or clashing channels.
        DataError: a field that isn't float or not finite, or has other channels.
    """

    def __init__(
        self,
        patch: int | list[int] = 16,
        stride_level: int = 1,
        mean: Numbers = 0.0,
        std: Numbers = 1.0,
        channels: int | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(patch, stride_level, field)
        self.mean, self.std, self.channels = mean, std, channels
        if min(std if isinstance(std, list) else [std]) <= 0:
            raise ConfigError(f"PatchAdapter.std must be above 0, got {std}")

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A masked autoencoder on digits and their edges."""
        return tiny_run({"image": (cls.__name__, {"patch": 4}), "edges": (cls.__name__, {"patch": 4})})

    def describe(self, spec: Spec) -> None:
        """Learn the number of channels."""
        known = self.said(spec).get("channels")
        if known is None and self.field == "image":
            known = spec.get("channels")
        if self.channels is None and known is None:
            raise ConfigError(f"the data does not say how many channels {self.name} has: set the adapter's channels")
        if self.channels is not None and known is not None and known != self.channels:
            raise ConfigError(f"{self.name} has channels={self.channels}, the data has {known}: drop the adapter's")
        self.channels = int(known if self.channels is None else self.channels)  # type: ignore[arg-type]
        for key, given in (("mean", self.mean), ("std", self.std)):
            if isinstance(given, list) and len(given) != self.channels:
                raise ConfigError(f"{key} of {self.name} has {len(given)} numbers for {self.channels} channels")
        self.values = self.channels * self.patch[0] * self.patch[1]

    def resolved(self) -> dict[str, Any]:
        """As a plain description."""
        given = {"patch": list(self.full), "stride_level": self.stride, "mean": self.mean, "std": self.std}
        return _plain(self, {**given, "channels": self.channels, "field": self.field})

    def build(self, spec: Spec) -> None:
        """Make the projection."""
        self.describe(spec)
        self.proj = nn.Linear(self.values, self.width)

    def patches(self, value: Tensor) -> Tensor:
        """[B,N,C*ph*pw], channel first, normalised."""
        value = value[:, None] if value.ndim == 3 else value
        if not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise DataError(f"{self.field} is {kind}: PatchAdapter reads floats, ClassMapAdapter reads ids")
        if value.shape[1] != self.channels:
            raise DataError(f"{self.field} has {value.shape[1]} channels, its adapter was built for {self.channels}")
        if not value.is_cuda and not bool(torch.isfinite(value).all()):
            count = int((~torch.isfinite(value)).sum())
            raise DataError(
                f"{self.field} has {count} non-finite values: fill them and mark them in {self.field}_valid "
                "(data.missing: mask does both)"
            )
        return patchify((value - self._row(self.mean, value)) / self._row(self.std, value), self.patch)

    def forward(self, value: Tensor) -> Tensor:
        """[B,C,H,W] → [B,N,D]."""
        return self.proj(self.patches(value))

    def picture(self, predicted: Tensor, grid: tuple[int, ...]) -> Tensor:
        """[B,N,C*ph*pw] → [B,C,H,W] in the field's unit."""
        made = unpatchify(predicted, (grid[0], grid[1]), self.patch)
        return made * self._row(self.std, made) + self._row(self.mean, made)

    @staticmethod
    def _row(given: Numbers, like: Tensor) -> Tensor:
        return torch.as_tensor(given, dtype=like.dtype, device=like.device).reshape(-1, 1, 1)


class ClassMapAdapter(ModalityAdapter):
    """Maps of class ids → tokens: a vector a class, then one linear map a patch. Bachmann et al. 2022.

    It reads [B,h,w] int64, stored at ``1/stride_level`` of the full picture's size.

    Args:
        patch: Patch size in pixels of the full picture, one number or [height, width].
        stride_level: Full pixels per id.
        classes: Number of classes; null takes it from the data.
        embed_dim: Width of a class's vector.
        ignore_index: An id that means no label, 255 for one: it gets a row of zeros and counts in no loss.
        field: Batch field; null is the modality's name.

    Raises:
        ConfigError: a stride that doesn't divide the patch, sizes that don't divide, unknown or clashing classes.
        DataError: a field that isn't int64, or has an id that is no class.
    """

    def __init__(
        self,
        patch: int | list[int] = 16,
        stride_level: int = 4,
        classes: int | None = None,
        embed_dim: int = 64,
        ignore_index: int | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(patch, stride_level, field)
        if classes is not None and classes < 2:
            raise ConfigError(f"ClassMapAdapter.classes must be at least 2, got {classes}")
        self.given, self.classes, self.embed_dim, self.ignore_index = classes, classes or 0, embed_dim, ignore_index

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A masked autoencoder on digits and maps of their levels."""
        return tiny_run({"image": ("PatchAdapter", {"patch": 4}), "semantic": (cls.__name__, LEVELS)})

    def describe(self, spec: Spec) -> None:
        """Learn the number of classes."""
        known = self.said(spec).get("classes")
        if self.given is None and known is None:
            raise ConfigError(f"the data does not say how many classes {self.name} has: set the adapter's classes")
        if self.given is not None and known is not None and known != self.given:
            raise ConfigError(f"{self.name} has classes={self.given}, the data has {known}: drop the adapter's")
        self.classes = int(known if self.given is None else self.given)  # type: ignore[arg-type]
        if self.ignore_index is not None and 0 <= self.ignore_index < self.classes:
            raise ConfigError(f"ignore_index={self.ignore_index} of {self.name} is one of its {self.classes} classes")
        self.values = self.classes * self.patch[0] * self.patch[1]

    def resolved(self) -> dict[str, Any]:
        """As a plain description."""
        given = {"patch": list(self.full), "stride_level": self.stride, "classes": self.classes}
        more = {"embed_dim": self.embed_dim, "ignore_index": self.ignore_index, "field": self.field}
        return _plain(self, {**given, **more})

    def build(self, spec: Spec) -> None:
        """Make the vectors and the projection."""
        self.describe(spec)
        ignored = self.ignore_index is not None
        self.vectors = nn.Embedding(self.classes + ignored, self.embed_dim, self.classes if ignored else None)
        self.proj = nn.Linear(self.embed_dim * self.patch[0] * self.patch[1], self.width)

    def patches(self, value: Tensor) -> Tensor:
        """[B,N,ph*pw] ids."""
        if value.dtype != torch.long or value.ndim != 3:
            kind = str(value.dtype).removeprefix("torch.")
            raise DataError(f"{self.field} is {kind} {list(value.shape)}; a class map is int64 [B,H,W]")
        if not value.is_cuda:
            bad = (value < 0) | (value >= self.classes)
            if self.ignore_index is not None:
                bad &= value != self.ignore_index
            if bool(bad.any()):
                found = int(value[bad][0])
                more = "; ids without a label need ignore_index" if found == 255 or found < 0 else ""
                raise DataError(f"{self.field} has id {found} but classes={self.classes}{more}")
        return patchify(value[:, None], self.patch)

    def forward(self, value: Tensor) -> Tensor:
        """[B,h,w] → [B,N,D]."""
        ids = self.patches(value)
        if self.ignore_index is not None:
            ids = torch.where(ids == self.ignore_index, self.classes, ids)
        return self.proj(self.vectors(ids).transpose(2, 3).flatten(2))  # channel first, as in a convolution

    def picture(self, predicted: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Logits [B,N,classes*ph*pw] → ids [B,h,w]."""
        ids = predicted.unflatten(-1, (self.classes, -1)).argmax(2)
        return unpatchify(ids, (grid[0], grid[1]), self.patch)[:, 0]


def _plain(adapter: ModalityAdapter, arguments: dict[str, Any]) -> dict[str, Any]:
    cls = type(adapter)
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": arguments}


LEVELS: dict[str, Any] = {"patch": 4, "stride_level": 1, "embed_dim": 4}
TINY_MODALITIES = {
    "image": ("PatchAdapter", {"patch": 4}),
    "edges": ("PatchAdapter", {"patch": 4}),
    "semantic": ("ClassMapAdapter", LEVELS),
}


def tiny_run(modalities: dict[str, tuple[str, dict[str, Any]]] | None = None, visible: int = 4) -> dict[str, Any]:
    """A complete small run of all parts of this plugin on digits, their edges and their levels."""
    chosen = modalities or TINY_MODALITIES
    made = {k: {"class_path": cls, "init_args": arguments} for k, (cls, arguments) in chosen.items()}
    trunk = {"modalities": made, "width": 16, "depth": 1, "heads": 2}
    masking = {"class_path": "DirichletMask", "init_args": {"visible": visible}}
    objective = {"masking": masking, "pictures": 0}
    return {
        "model": {
            "encoder": {"class_path": "MultiModalViT", "init_args": trunk},
            "decoder": {"class_path": "MultiTaskDecoder", "init_args": {"width": 16, "heads": 2, "depth": 1}},
            "objective": {"class_path": "MaskedMultiTask", "init_args": objective},
        },
        "data": {"class_path": "DigitModalities", "init_args": {"train_samples": 128}},
    }
