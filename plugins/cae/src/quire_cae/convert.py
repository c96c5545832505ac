"""``quire cae-tokenizer``: the numbers out of a pickled tokenizer, without running any of its code."""

from __future__ import annotations

import collections
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from quire.commands import Arguments
from quire.errors import ConfigError
from quire_cae.dalle import DvaeEncoder

ALLOWED = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("collections", "OrderedDict"): collections.OrderedDict,
}
STORAGES = ("FloatStorage", "HalfStorage", "DoubleStorage", "LongStorage", "BFloat16Storage")


class _Husk:
    """Stands for every other class or function of the pickle: keeps state, does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Husk:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _Harmless(pickle.Unpickler):
    """Makes tensors; anything else that the file names becomes a husk."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module == "torch" and name in STORAGES:
            return getattr(torch, name)
        return type(name, (_Husk,), {})


def weights(path: Path) -> dict[str, Tensor]:
    """Names and values of a pickled module's parameters and buffers.

    Raises:
        ConfigError: no such file, or nothing in it that looks like a module.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    reader = SimpleNamespace(Unpickler=_Harmless, load=lambda f, **more: _Harmless(f, **more).load(), __name__="husks")
    try:
        root = torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is no file that torch.save wrote, or is truncated") from error
    found = dict(_walk(root, ""))
    if not found:
        raise ConfigError(f"{path} holds no module with weights")
    return found


def _walk(module: Any, prefix: str) -> Any:
    inside = module if isinstance(module, dict) else getattr(module, "__dict__", {})
    if isinstance(module, dict):
        yield from ((k, v.detach()) for k, v in module.items() if isinstance(v, Tensor))
    for kind in ("_parameters", "_buffers"):
        for name, value in (inside.get(kind) or {}).items():
            if isinstance(value, Tensor):
                yield prefix + name, value.detach()
    for name, child in (inside.get("_modules") or {}).items():
        yield from _walk(child, f"{prefix}{name}.")


def convert(source: Path, target: Path) -> int:
    """Write the discrete VAE encoder in ``source`` as safetensors; returns the number of its codes.

    Raises:
        ConfigError: a file that isn't one.
    """
    from safetensors.torch import save_file

    short = {"w": "weight", "b": "bias"}
    state: dict[str, Tensor] = {}
    for name, value in weights(source).items():
        head, _, last = name.rpartition(".")
        state[f"{head}.{short.get(last, last)}"] = value.float().contiguous()
    try:
        net = DvaeEncoder.like({k: tuple(v.shape) for k, v in state.items()})
        net.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise ConfigError(f"{source} doesn't hold the encoder of a discrete VAE in DALL-E's layout") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), str(target))
    return net.blocks.output.conv.out_channels  # type: ignore[union-attr, return-value]


def main(argv: list[str]) -> int:
    """``quire cae-tokenizer SOURCE TARGET``."""
    parser = Arguments(prog="quire cae-tokenizer", description="a pickled DALL-E encoder as safetensors, no code run")
    parser.add_argument("source", help="the published encoder.pkl")
    parser.add_argument("target", help="the safetensors file to write")
    options = parser.parse_args(argv)
    codes = convert(Path(options.source).expanduser(), Path(options.target).expanduser())
    print(f"wrote {options.target}: {codes} codes")
    return 0
