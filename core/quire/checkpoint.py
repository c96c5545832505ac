"""Checkpoints that rebuild without YAML and run no foreign code; export and import as safetensors."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors.torch import load_model, save_model

from quire.contracts import SLOTS, Component, Decoder, Encoder, Objective, Part, Sampler, plain
from quire.errors import ConfigError
from quire.optimizers import each, optimizer_plain
from quire.plugins import load as installed
from quire.recipe import adopt, instantiate

if TYPE_CHECKING:
    from quire.model import Model


def describe(model: Model) -> dict[str, Any]:
    """What ``hyper_parameters`` of a checkpoint holds: every part as plain values, the optimizer, the sizes."""
    parts: dict[str, Any] = {}
    for slot in SLOTS:
        part = getattr(model, slot)
        parts[slot] = None if part is None else plain(part)
    parts["metrics"] = [plain(m) for m in model.metrics if isinstance(m, Component)]
    parts["optimizer"] = each(model.optimizer, optimizer_plain)
    parts["schedule"] = each(model.schedule, plain)
    parts["spec"] = dict(model.spec) if model.spec is not None else None
    return parts


# ---- reading
def stamp(model: Model) -> dict[str, Any]:
    """Versions of the plugins whose parts are in the model, the seed, and the layout of this record."""
    records = installed().records
    registry = installed().registry
    used = {"core"}
    for part in model.components():
        entry = registry.by_path(f"{type(part).__module__}.{type(part).__qualname__}")
        used |= {entry.plugin} if entry else set()
    plugins = {records[p].distribution: records[p].version for p in sorted(used) if p in records}
    tokenizer = getattr(model, "tokenizer", None)
    kept = None if tokenizer is None else {**plain(tokenizer), "state": tokenizer.state()}
    return {"format": 1, "plugins": plugins, "seed": model.seed, "tokenizer": kept}


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint file as plain values and tensors. Raises ``ConfigError`` in one sentence; never runs its code."""
    file = Path(path).expanduser()
    if is_sharded(file):
        raise ConfigError(f"{file} is in shards: quire consolidate {file} makes one file of it")
    if not file.is_file():
        raise ConfigError(f"no checkpoint at {file}")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "weights_only" in str(error).lower():
            raise ConfigError(f"{file} holds pickled code, which Quire never runs: export it as safetensors") from error
        raise ConfigError(f"{file} is not a checkpoint, or is truncated") from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        raise ConfigError(f"{file} is not a checkpoint, or is truncated") from error
    if not isinstance(content, dict) or "state_dict" not in content or "quire" not in content:
        raise ConfigError(f"{file} is not a Quire checkpoint: it has no record of its parts")
    return content


def is_sharded(path: str | Path) -> bool:
    """Whether it is a folder of shards, as ``ModelParallelStrategy`` writes."""
    return (Path(path) / "meta.pt").is_file() and (Path(path) / ".metadata").is_file()


def fingerprint(path: str | Path) -> str:
    """sha256 of a file or of an exported folder's weights."""
    file = Path(path)
    if file.is_dir():
        file = file / "model.safetensors"
    with file.open("rb") as handle:
        digest = hashlib.sha256()
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load(path: str | Path) -> Model:
    """Rebuild a model from a checkpoint, an exported folder, or ``hf:owner/name``; no YAML needed.

    Args:
        path: A ``.ckpt`` file, a folder written by :func:`export`, or a hub name with the prefix ``hf:``.

    Returns:
        The model in eval mode, on the CPU.

    Raises:
        ConfigError: no such file, not a Quire checkpoint, pickled code, or a plugin that is missing (named).
    """
    if str(path).startswith("hf:"):
        try:
            from huggingface_hub import snapshot_download
        except ImportError as error:
            raise ConfigError("hf: paths need huggingface_hub: pip install huggingface_hub") from error
        path = snapshot_download(str(path).removeprefix("hf:"))
    from quire.model import Model

    folder = Path(path)
    exported = folder.is_dir() and not is_sharded(folder)
    content = _read_export(folder) if exported else read(path)
    model = Model(**content["hyper_parameters"])
    model.configure_model()
    if kept := content["quire"].get("tokenizer"):
        tokenizer = instantiate(kept)
        tokenizer.restore(kept["state"])
        model.refer_tokenizer(tokenizer)
    if exported:
        load_model(model, folder / "model.safetensors")
    else:
        model.load_state_dict(content["state_dict"])
    return model.eval()


def compare(model: Model, content: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` when a checkpoint's weights are not this model's, naming the first difference."""
    if "quire" not in content:
        raise ConfigError("not a Quire checkpoint: it has no record of its parts")
    theirs, ours = content.get("hyper_parameters", {}), describe(model)
    wanted = _shapes(model.state_dict())
    weights = _shapes(content["state_dict"]) if "state_dict" in content else wanted  # shards are compared on reading
    idle = () if model.objective is not None else ("objective.",)
    weights = {k: v for k, v in weights.items() if not k.startswith(idle)} if idle else weights
    wanted = {k: v for k, v in wanted.items() if k in weights or not k.startswith(("sampler.", "metrics."))}
    slots = ("encoder", "decoder") if weights == wanted or idle else ("encoder", "decoder", "objective")
    for slot in slots:
        a, b = theirs.get(slot) or {}, ours.get(slot) or {}
        if a.get("class_path") != b.get("class_path"):
            raise ConfigError(
                f"the checkpoint's {slot} is {_short(a)}, this run's is {_short(b)}: use the YAML it was trained with"
            )
        arguments, given = a.get("init_args") or {}, b.get("init_args") or {}
        for key in sorted(arguments) if weights != wanted else ():
            if arguments[key] != given.get(key, arguments[key]) and not isinstance(arguments[key], (dict, list)):
                raise ConfigError(
                    f"the checkpoint's {slot}.{key} is {arguments[key]}, this run's is {given[key]}: make them agree"
                )
    sizes, found = theirs.get("spec") or {}, ours.get("spec") or {}
    for key in sorted({*sizes} & {*found}) if weights != wanted else ():
        if sizes[key] != found[key]:
            raise ConfigError(
                f"the checkpoint's data has {key}={sizes[key]}, this run's has {key}={found[key]}: make them agree"
            )
    for name in sorted({*weights, *wanted}):
        if name not in weights or name not in wanted:
            where = "the checkpoint" if name in weights else "this run"
            raise ConfigError(f"only {where} has the weight {name}: use the YAML that the checkpoint was trained with")
        if weights[name] != wanted[name]:
            a, b = list(weights[name]), list(wanted[name])
            raise ConfigError(f"the weight {name} is {a} in the checkpoint and {b} in this run: make the sizes agree")


def _short(what: Mapping[str, Any]) -> str:
    return what["class_path"].rpartition(".")[2] if what else "not set"


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in state.items() if isinstance(v, torch.Tensor)}


# ---- writing
class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it when it is complete: a kill leaves the old file or the new.

    Lightning's own writer builds the file in the system's temporary folder, and moving it from there to another disk
    is a copy, which can be cut short.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write, flush to the disk, rename. Paths of remote file systems go Lightning's way."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        with part.open("wb") as handle:
            torch.save(checkpoint, handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(part, target)


def write_whole_files(trainer: Any) -> None:
    """Give a Trainer ``WholeFiles``, unless its strategy has a writer of its own."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeFiles()


# ---- export
def export(model: Model, folder: str | Path) -> Path:
    """Write ``model.safetensors`` and ``config.json``: weights and how to rebuild, nothing that can run.

    Args:
        model: A built model.
        folder: Where to; made if missing.

    Returns:
        The folder.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    save_model(model, str(target / "model.safetensors"))
    record = {"hyper_parameters": describe(model), "quire": stamp(model)}
    (target / "config.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return target


def _read_export(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if (folder / "model.safetensors").is_file() and "hyper_parameters" in content:
            return content
    except (FileNotFoundError, json.JSONDecodeError):
        pass
    raise ConfigError(f"{folder} is not an exported Quire model: it needs config.json and model.safetensors")


class Pretrained(Encoder, Decoder, Objective, Sampler, Part):
    """A part of a trained model, standing wherever a component is expected.

    What is made is the loaded part itself, built and with its weights; a new checkpoint holds its class path,
    arguments and this file's fingerprint, so it reloads when the old file is gone.

    Args:
        path: A Quire checkpoint, or a folder written by ``quire.export``.
        part: Which part: encoder, decoder, objective or sampler; dots reach inside (``decoder.decoder``).
        freeze: Keep it in eval mode without gradients; false fine-tunes it.
        layer_decay: Factor on the learning rate per layer below the top, in (0, 1]; null for none.

    Raises:
        ConfigError: no such file or part, or a ``layer_decay`` outside (0, 1].
    """

    stands_in = True  # ``__new__`` gives the loaded part, of whatever role that is

    def __new__(cls, path: str, part: str = "encoder", freeze: bool = True, layer_decay: float | None = None) -> Any:
        """The loaded part, not a ``Pretrained``."""
        from quire.data import expand

        if layer_decay is not None and not 0 < layer_decay <= 1:
            raise ConfigError(f"layer_decay must be in (0, 1], got {layer_decay}")
        file = expand(path)
        model = load(file)
        found: Any = model
        for name in part.split("."):
            found = getattr(found, name, None)
        if not isinstance(found, Component):
            have = ", ".join(s for s in SLOTS if getattr(model, s) is not None)
            raise ConfigError(f"{file} has no part {part!r}; it has {have}")
        origin = {
            "path": str(path),
            "sha256": fingerprint(file),
            "spec": dict(found.__dict__["built_with"]),
            "freeze": freeze,
            "layer_decay": layer_decay,
        }
        adopt(found, origin)
        return found

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A frozen encoder, exported to a temporary folder, under a new head on digits."""
        from quire.model import Model

        first: Any = instantiate({"class_path": "MlpVectorEncoder"})
        model = Model(encoder=first, spec={"image_size": [8, 8], "channels": 1})
        model.configure_model()
        encoder = {"class_path": "Pretrained", "init_args": {"path": str(export(model, tempfile.mkdtemp()))}}
        return {"model": {"encoder": encoder, "objective": "Classify"}, "data": "Digits"}

    def __init__(
        self, path: str, part: str = "encoder", freeze: bool = True, layer_decay: float | None = None
    ) -> None:  # read by the YAML parser; __new__ returns another class, so it never runs
        super().__init__()
