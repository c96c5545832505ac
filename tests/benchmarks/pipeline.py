"""Images a second from an ImageFolder beside the bare loop that decodes the same files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from tests.benchmarks.clock import one_thread, race, ratio, table

COUNT, SIZE, BATCH = 64, 224, 16


def photographs(folder: Path) -> list[Path]:
    """Crops of scikit-learn's two photographs as JPEG files of 320x480 pixels."""
    from quire.datasets.samples import SampleImages

    data = SampleImages(size=[320, 480], length=COUNT).dataset("train")  # type: ignore[arg-type]
    data.scale = 1.6  # its regions are smaller than that
    files = []
    for i in range(COUNT):
        pixels = (data[i]["image"] * 255).round().byte().permute(1, 2, 0).numpy()
        files.append(folder / f"{i:03}.jpg")
        Image.fromarray(pixels).save(files[-1], quality=90)
    return files


def decoded(files: list[Path], size: int | None) -> Callable[[], Any]:
    """The bare loop: open, decode, as floats; resized to cover ``size`` and cut by Pillow where it is given."""

    def once() -> None:
        for start in range(0, len(files), BATCH):
            rows = []
            for file in files[start : start + BATCH]:
                with Image.open(file) as image:
                    made = image.convert("RGB")
                if size is not None:
                    scale = size / min(made.size)
                    made = made.resize(
                        (round(made.width * scale), round(made.height * scale)), Image.Resampling.BILINEAR
                    )
                    made = made.crop((0, 0, size, size))
                rows.append(torch.from_numpy(np.asarray(made).copy()).permute(2, 0, 1).float() / 255)
            torch.stack(rows)

    return once


def loaded(folder: Path, size: int | None) -> Callable[[], Any]:
    """Every training batch of an ImageFolder."""
    from quire.datasets.folder import ImageFolder

    data = ImageFolder(str(folder), size=size, batch_size=BATCH, test_fraction=1e-9)
    loader = data.loader("train")

    def batches() -> Iterator[Any]:
        yield from loader

    return lambda: [None for _ in batches()]


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as place, one_thread():
        files = photographs(Path(place))
        arms = {
            "bare loop, decoded": decoded(files, None),
            "ImageFolder, as they are": loaded(Path(place), None),
            f"bare loop, decoded, resized to {SIZE} by Pillow": decoded(files, SIZE),
            f"ImageFolder, size {SIZE}": loaded(Path(place), SIZE),
        }
        spent = race(arms)
        rows = [["", "images a CPU-second", "time over the bare loop"]]
        base = ""
        for name, times in spent.items():
            base = name if name.startswith("bare") else base
            share = COUNT - 1 if name.startswith("Image") else COUNT  # one file is the test part
            times = [t / share for t in times]
            rows.append([name, f"{1 / median(times):.0f}", ratio(times, [t / COUNT for t in spent[base]])])
        table(f"Input: {COUNT} JPEG files of 320x480 pixels, batch {BATCH}, no worker processes", rows)


if __name__ == "__main__":
    main()
