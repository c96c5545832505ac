"""``quire pseudo-label``: make a modality's files from another's, for PairedFolders. After Bachmann et al. 2022."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quire.commands import Arguments
from quire.data import expand
from quire.errors import ConfigError, DataError
from quire_multimae.derived import grey, quantize, sobel
from quire_multimae.files import read, write

Labeller = Callable[[Tensor], Tensor]


def sharpness(image: Tensor) -> Tensor:
    """Local contrast in [0,1], [B,C,H,W] → [B,1,H,W]: a classical stand-in for depth where focus tells it."""
    edges = sobel(grey(image))
    side = max(3, min(image.shape[-2:]) // 8 | 1)
    blurred = F.avg_pool2d(F.pad(edges, (side // 2,) * 4, mode="replicate"), side, 1)
    low, high = blurred.amin((1, 2, 3), keepdim=True), blurred.amax((1, 2, 3), keepdim=True)
    return (blurred - low) / (high - low).clamp(min=1e-6)


def labeller(said: str) -> Labeller:
    """A function from an image [3,H,W] in [0,1] to float [1,H,W] in [0,1] or int64 [H,W].

    Args:
        said: ``sobel``, ``levels:N``, ``sharpness``, ``hub:TASK:NAME`` (a transformers pipeline, fetched where there
            is a network), or ``module:function``.

    Raises:
        ConfigError: nothing of that name.
    """
    kind, _, rest = said.partition(":")
    if said in ("sobel", "sharpness"):
        function = sobel if said == "sobel" else sharpness
        return lambda image: function(image[None])[0]
    if kind == "levels" and rest.isdigit() and int(rest) > 1:
        return lambda image: quantize(image[None], int(rest))[0]
    if kind == "hub" and ":" in rest:
        return _hub(*rest.split(":", 1))
    if rest:
        try:
            return getattr(importlib.import_module(kind), rest)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"--with {said}: {error}") from error
    raise ConfigError(f"--with {said!r} is not known: sobel, sharpness, levels:N, hub:TASK:NAME or module:function")


def _hub(task: str, name: str) -> Labeller:
    if task not in ("depth-estimation", "image-segmentation"):
        raise ConfigError(f"--with hub: takes depth-estimation or image-segmentation, got {task!r}")
    try:
        from transformers import pipeline

        made: Any = pipeline(task, model=name)  # type: ignore[call-overload]
    except Exception as error:  # no package, no network, no such model: each fails in its own way
        raise ConfigError(f"--with hub:{task}:{name} can't be loaded: {str(error).splitlines()[0]}") from error

    def label(image: Tensor) -> Tensor:
        from torchvision.transforms.functional import to_pil_image

        found = made(to_pil_image(image))
        if task == "depth-estimation":
            depth = (
                torch.as_tensor(found["predicted_depth"]).float().reshape(1, 1, *found["predicted_depth"].shape[-2:])
            )
            depth = F.interpolate(depth, image.shape[1:], mode="bilinear", align_corners=False)[0]
            return (depth - depth.min()) / (depth.max() - depth.min()).clamp(min=1e-6)
        known = made.model.config.label2id
        ids = torch.full(image.shape[1:], 255, dtype=torch.long)
        for one in found:
            mask = torch.as_tensor(list(one["mask"].getdata())).reshape(image.shape[1:]) > 0
            ids[mask] = int(known[one["label"]])
        return ids

    return label


def main(argv: list[str]) -> int:
    """``quire pseudo-label ROOT --to NAME --with WHAT``: write root/split/NAME beside root/split/image."""
    parser = Arguments(prog="quire pseudo-label", description="make a modality's files from the images'")
    parser.add_argument("root", help="a PairedFolders tree: root/split/modality/class/file")
    parser.add_argument("--to", required=True, help="modality to write")
    parser.add_argument(
        "--with", dest="how", default="sobel", help="sobel, sharpness, levels:N, hub:TASK:NAME, module:function"
    )
    parser.add_argument("--from", dest="source", default="image", help="modality to read (pictures)")
    parser.add_argument("--split", help="one split; default: every one there is")
    parser.add_argument("--overwrite", action="store_true", help="write files that are there already, too")
    options = parser.parse_args(argv)
    if options.to == options.source:
        raise ConfigError(f"--to {options.to} is what is read: choose another name")
    root = expand(options.root)
    splits = [root / options.split] if options.split else sorted(f for f in root.glob("*") if f.is_dir())
    folders = [s / options.source for s in splits if (s / options.source).is_dir()]
    if not folders:
        raise ConfigError(f"{root} has no split with a folder {options.source} (root/split/modality/class/file)")
    function, written = labeller(options.how), 0
    for folder in folders:
        for file in sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.startswith(".")):
            target = folder.parent / options.to / file.relative_to(folder).with_suffix(".png")
            if target.exists() and not options.overwrite:
                continue
            write(target, _checked(function(read(file, "rgb")), file))
            written += 1
    print(f"wrote {written} files of {options.to} under {root}")
    return 0


def _checked(value: Tensor, file: Path) -> Tensor:
    if not (value.ndim == 3 and value.is_floating_point()) and not (value.ndim == 2 and value.dtype == torch.long):
        kind = str(value.dtype).removeprefix("torch.")
        raise DataError(f"{file}: --with gave {kind} {list(value.shape)}; it must be float [1,H,W] or int64 [H,W]")
    return value
