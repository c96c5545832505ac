"""The broken files that the cases name, written small into one folder."""

from __future__ import annotations

import os
import struct
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


def write_all(folder: Path) -> None:
    """Write every file. ``ckpt/codes.ckpt`` is there already: a good one, to cut, spoil and mislabel."""
    _idx(folder)
    _images(folder)
    _sounds(folder)
    _arrays(folder)
    _checkpoints(folder / "ckpt")
    _configs(folder)
    _clashing_plugins(folder / "site")


class Evil:
    """A pickle that would write a file when it is loaded."""

    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def _idx(folder: Path) -> None:
    pixels, labels = np.zeros((20, 8, 8), np.uint8), np.arange(20, dtype=np.uint8) % 10
    good = {"images-idx3": _idx_bytes(pixels), "labels-idx1": _idx_bytes(labels)}
    spoilt: dict[str, dict[str, bytes | None]] = {
        "idx-cut": {"images-idx3": good["images-idx3"][:-100]},
        "idx-head": {"images-idx3": good["images-idx3"][:7]},
        "idx-html": {"images-idx3": b"<html>404</html>"},
        "idx-counts": {"labels-idx1": _idx_bytes(labels[:-1])},
        "idx-alone": {"labels-idx1": None},
    }
    for name, changed in spoilt.items():
        (folder / name).mkdir()
        for part in ("train", "t10k"):
            for kind, content in {**good, **changed}.items():
                if content is not None:
                    (folder / name / f"{part}-{kind}-ubyte").write_bytes(content)


def _idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">2xBB{array.ndim}I", 8, array.ndim, *array.shape) + array.tobytes()


def _images(folder: Path) -> None:
    for name, sizes in {"png-cut": (8, 8), "png-text": (8, 8), "png-sizes": (8, 12), "png-beside": (8, 8)}.items():
        for kind in ("cat", "dog"):
            (folder / name / kind).mkdir(parents=True)
            for i in range(10):
                side = sizes[i % 2]
                noise = np.random.default_rng(i).integers(0, 255, (side, side, 3), np.uint8)
                Image.fromarray(noise).save(folder / name / kind / f"{i}.png")
    for i in range(10):
        file = folder / "png-cut/cat" / f"{i}.png"
        file.write_bytes(file.read_bytes()[:-40])
        (folder / "png-text/dog" / f"{i}.png").write_text("not a picture")
    (folder / "empty").mkdir()
    (folder / "png-beside/cat/0.png").rename(folder / "png-beside/0.png")


def _sounds(folder: Path) -> None:
    kinds = ("wav-cut", "wav-text", "wav-stereo", "wav-rates", "wav-none", "wav-short", "wav-good")
    for name in kinds:
        for part in ("train", "test"):
            for kind in ("yes", "no"):
                place = folder / name / part / kind
                place.mkdir(parents=True)
                for i in range(3):
                    channels = 2 if name == "wav-stereo" else 1
                    rate = 11025 if name == "wav-rates" and kind == "yes" else 8000
                    length = {"wav-none": 0, "wav-short": 30}.get(name, 2400)
                    file = place / f"{i}.wav"
                    with wave.open(str(file), "wb") as opened:
                        opened.setparams((channels, 2, rate, 0, "NONE", ""))
                        opened.writeframes(b"\1\2" * length * channels)
                    if name == "wav-cut":
                        file.write_bytes(file.read_bytes()[:-500])
                    if name == "wav-text":
                        file.write_text("no sound")


def _arrays(folder: Path) -> None:
    pixels, labels = np.random.default_rng(0).random((40, 8, 8), np.float32), np.arange(40) % 4
    hole = pixels.copy()
    hole[:, 3, 3] = np.nan
    np.savez(folder / "good.npz", images=pixels, labels=labels)
    np.savez(folder / "nan.npz", images=hole, labels=labels)
    np.savez(folder / "bytes-as-floats.npz", images=pixels * 255, labels=labels)
    np.savez(folder / "other-keys.npz", x=pixels, y=labels)
    np.savez(folder / "flat.npz", images=pixels.reshape(40, 64), labels=labels)
    np.savez(folder / "objects.npz", images=np.array([{}] * 4), labels=labels[:4])
    np.savez(folder / "negative.npz", images=pixels, labels=labels - 1)
    (folder / "cut.npz").write_bytes((folder / "good.npz").read_bytes()[:900])


def _checkpoints(folder: Path) -> None:
    good = folder / "codes.ckpt"
    content = torch.load(good, weights_only=True)
    (folder / "cut.ckpt").write_bytes(good.read_bytes()[:-2000])
    (folder / "text.ckpt").write_text("hello")
    (folder / "zero.ckpt").write_bytes(b"")
    torch.save({"epoch": 3}, folder / "dict.ckpt")
    torch.save(content["state_dict"], folder / "weights.ckpt")
    torch.save({**content, "evil": Evil()}, folder / "evil.ckpt")
    content["hyper_parameters"]["encoder"] = {"class_path": "quire_nowhere.encoder.Far", "init_args": {}}
    torch.save(content, folder / "plugin.ckpt")
    content["hyper_parameters"]["encoder"] = {"class_path": "os.system", "init_args": {"command": "touch pwned"}}
    torch.save(content, folder / "call.ckpt")


def _configs(folder: Path) -> None:
    (folder / "tab.yaml").write_text("model:\n\tencoder: FlatPixels\n")
    (folder / "open.yaml").write_text("model: {encoder: FlatPixels\ndata: Digits\n")
    (folder / "list.yaml").write_text("- model\n- data\n")
    (folder / "latin.yaml").write_bytes("data: Dígits\n".encode("latin-1"))
    (folder / "void.yaml").write_text("")
    (folder / "folder.yaml").mkdir()


def _clashing_plugins(folder: Path) -> None:
    folder.mkdir()
    plugins = {
        "left": "register('fake_left.Both', 'encoder')",
        "right": "register('fake_right.Both', 'encoder')",
        "lost": "register('fake_lost_parts.Gone', 'encoder')",
        "sick": "import nothing_like_this",
    }
    for name, line in plugins.items():
        source = f"from quire import hookimpl\n\n\n@hookimpl\ndef quire_components(register):\n    {line}\n"
        (folder / f"fake_{name}.py").write_text(source)
        info = folder / f"quire_{name}-2.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: quire-{name}\nVersion: 2.5\n")
        (info / "entry_points.txt").write_text(f"[quire]\n{name} = fake_{name}\n")
