"""One pass over all training data: what each prototype is nearest to, in codes and in pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from quire.contracts import Batch
from quire.data import DataModule
from quire.errors import ConfigError
from quire.model import Model
from quire.roles.latent import PixelDecoder
from quire_prototypes.distances import squared_distances
from quire_prototypes.modules import PrototypeLayer, codes_of, layer_of


@dataclass
class Scan:
    """The prototypes against the whole training split.

    Attributes:
        r1: R1 over all training data. r2: R2 over all training data.
        nearest: [m] int64, place of the nearest training sample in its split.
        distance: [m], squared, to it. codes: [m,q], its code. label: [m], its class, or None.
        pixels: [m], squared pixel distance of the decoded prototype to the nearest training image, or None.
    """

    r1: Tensor
    r2: Tensor
    nearest: Tensor
    distance: Tensor
    codes: Tensor
    label: Tensor | None
    pixels: Tensor | None


_last: WeakKeyDictionary[PrototypeLayer, tuple[tuple[int, ...], Scan]] = WeakKeyDictionary()


def source_of(model: Model) -> DataModule | None:
    """The run's data module; None outside a run or where loaders were given by hand."""
    return model.datamodule


def need_source(model: Model, asker: object) -> DataModule:
    """As ``source_of``. Raises ``ConfigError`` when there is none."""
    source = source_of(model)
    if source is None:
        raise ConfigError(f"{type(asker).__name__} looks at the training split of a data module: give data as one")
    return source


def batches(model: Model, source: DataModule, size: int = 512) -> Iterator[Batch]:
    """The whole training split in order, so every rank sees everything and results need no reduction."""
    total = len(source.dataset("train"))  # type: ignore[arg-type]
    for start in range(0, total, size):
        yield take(model, source, "train", list(range(start, min(start + size, total))))


def take(model: Model, source: DataModule, split: str, places: list[int]) -> Batch:
    """The samples at ``places`` of a split, on the model's device, with the transforms of evaluation.

    Draws come from a generator of its own: no random stream of the run moves.
    """
    data = source.dataset(split)
    fetch = getattr(data, "__getitems__", None)
    batch = fetch(places) if fetch else [data[i] for i in places]
    batch = batch if isinstance(batch, dict) else source.collate(batch)
    batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return source.transform(batch, torch.Generator(model.device).manual_seed(source.seed), training=False)


@torch.no_grad()
def encode(model: Model, source: DataModule) -> tuple[Tensor, Tensor | None]:
    """All training codes [N,q] and labels [N] (None without), in order; the model's train mode comes back."""
    codes, labels = [], []
    with evaluating(model):
        for batch in batches(model, source):
            codes.append(codes_of(model, batch).vector.float())
            labels += [batch["label"]] if "label" in batch else []
    return torch.cat(codes), torch.cat(labels) if labels else None


class evaluating:
    """Every module in eval mode, and back to the mode that each one had."""

    def __init__(self, model: Model) -> None:
        self.modes = [(module, module.training) for module in model.modules()]
        self.model = model

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        for module, mode in self.modes:
            module.training = mode


def scan(model: Model, source: DataModule) -> Scan:
    """Compare the prototypes with all training data; the last answer is kept until a weight changes."""
    layer = layer_of(model)
    state = [*model.encoder.state_dict().values(), *layer.state_dict().values()]
    key = (id(source), *(0 if t.is_inference() else t._version for t in state if isinstance(t, Tensor)))
    if layer not in _last or _last[layer][0] != key:
        _last[layer] = (key, _scan(model, layer, source))
    return _last[layer][1]


@torch.no_grad()
def _scan(model: Model, layer: PrototypeLayer, source: DataModule) -> Scan:
    prototypes = layer.prototypes
    best = prototypes.new_full((layer.count,), float("inf"), dtype=torch.float32)
    nearest = torch.zeros(layer.count, dtype=torch.long, device=best.device)
    label, codes = nearest.clone(), torch.zeros_like(prototypes, dtype=torch.float32)
    pixels, total, seen, labelled = best.clone(), best.new_zeros((), dtype=torch.float64), 0, False
    with evaluating(model):
        drawn = layer.pictures().flatten(1).float() if layer.role(PixelDecoder) else None
        for batch in batches(model, source):
            vectors = codes_of(model, batch).vector.float()
            distances = squared_distances(vectors, prototypes)
            value, row = distances.min(dim=0)
            closer = value < best
            best = torch.where(closer, value, best)
            nearest = torch.where(closer, row + seen, nearest)
            codes = torch.where(closer[:, None], vectors[row], codes)
            if "label" in batch:
                labelled, label = True, torch.where(closer, batch["label"][row], label)
            total += distances.min(dim=1).values.double().sum()
            seen += len(vectors)
            if drawn is not None:
                data = batch["image" if "image" in batch else "vector"].flatten(1).float()
                apart = torch.cdist(drawn, data, compute_mode="donot_use_mm_for_euclid_dist").square()
                pixels = torch.minimum(pixels, apart.min(dim=1).values)
    shown = pixels if drawn is not None else None
    return Scan(best.mean(), (total / seen).float(), nearest, best, codes, label if labelled else None, shown)
