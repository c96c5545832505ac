"""From what YAML says to a subject: an embedded one, a checkpoint, a transformers name, a component or a module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from quire.contracts import Component, Encoder, Spec, build
from quire.data import expand
from quire.errors import ConfigError
from quire.roles.language.contract import StepModel
from quire.roles.sites.subject import Subject


def open_subject(what: Any, source: Any = None, seed: int = 0) -> Subject:
    """A frozen subject.

    Args:
        what: ``tiny`` or ``tiny-30s``; a Quire checkpoint or exported folder; a folder or hub name for transformers;
            a component (``Pretrained``, or a language model, with random weights when it isn't built); any module.
        source: A data module, whose sizes an unbuilt component is made for.
        seed: Of an unbuilt component's weights.

    Raises:
        ConfigError: nothing there that can be studied.
    """
    if isinstance(what, Subject):
        return what
    if isinstance(what, str):
        return _named(what)
    if isinstance(what, Component):
        return _component(what, source, seed)
    if isinstance(what, nn.Module):
        return _module(what)
    raise ConfigError(f"data.subject is a {type(what).__name__}: give a name, a checkpoint or a model")


def _named(name: str) -> Subject:
    from quire.datasets.activations.tiny import STEPS, tiny_subject

    if name in STEPS:
        return of_model(_load(tiny_subject(name)), name)
    path = expand(name)
    if path.suffix == ".ckpt" or name.startswith("hf:") or _exported(path):
        return of_model(_load(name if name.startswith("hf:") else path), name)
    from quire.roles.language.hf import HFCausal
    from quire.roles.language.text import HFTokenizer

    decoder = HFCausal(name=name)
    build(decoder, Spec())
    return Subject(decoder.eval(), name, HFTokenizer(name))


def _exported(path: Path) -> bool:
    record = path / "config.json"
    return record.is_file() and (path / "model.safetensors").is_file() and '"hyper_parameters"' in record.read_text()


def _load(path: Any) -> Any:
    from quire.checkpoint import load

    return load(path)


def of_model(model: Any, name: str) -> Subject:
    """The language model of a Quire model, else its encoder."""
    part = None if model.decoder is None else model.decoder.role(StepModel)
    part = model.encoder if part is None else part
    if part is None:
        raise ConfigError(f"{name} has neither a language model nor an encoder to study")
    return Subject(part.eval(), name, model.tokenizer, model)


def _component(part: Component, source: Any, seed: int) -> Subject:
    name = str((part.__dict__.get("origin") or {}).get("path") or type(part).__name__)
    if not isinstance(part, (StepModel, Encoder)):
        raise ConfigError(f"data.subject is {type(part).__name__}: give a language model or an encoder")
    if not part.built:
        if source is None:
            raise ConfigError(
                f"subject {type(part).__name__} has no weights and no data to be made for: give data.source as a data"
                " module, or a checkpoint"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            build(part, Spec(source.spec))
    tokenizer = getattr(source, "tokenizer", None)
    if tokenizer is None and "origin" in part.__dict__ and expand(name).exists():
        tokenizer = _load(expand(name)).tokenizer
    return Subject(part.eval(), name, tokenizer)


def _module(module: nn.Module) -> Subject:
    name = str(getattr(getattr(module, "config", None), "_name_or_path", "") or type(module).__name__)
    if hasattr(module, "get_decoder") and hasattr(module, "config"):
        from quire.roles.language.hf import HFCausal, HFSeq2Seq

        kind = HFSeq2Seq if module.config.is_encoder_decoder else HFCausal  # type: ignore[union-attr]
        return Subject(kind.of(module), name)
    return Subject(module, name)
