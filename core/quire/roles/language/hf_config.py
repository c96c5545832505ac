"""Configs of transformers models: read from a folder or hub, made from a dict and the data's sizes, recorded."""

from __future__ import annotations

import difflib
from typing import Any

from quire.contracts import Spec
from quire.data import expand
from quire.errors import ConfigError

IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def _transformers(asker: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"{asker} needs transformers: pip install 'quire[text]'") from error
    return transformers


def read_config(name: str, asker: str) -> tuple[str, dict[str, Any]]:
    """Where a folder or hub name leads, and its config with the ids that its generation config sets."""
    transformers = _transformers(asker)
    folder = expand(name)
    path = str(folder) if folder.exists() else name
    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except Exception as error:  # the library raises many kinds for one fact
        raise ConfigError(
            f"{asker}: nothing to load at {path}: give a folder with config.json or a hub name"
        ) from error
    try:
        generation = transformers.GenerationConfig.from_pretrained(path)
    except OSError:  # a folder without one
        generation = None
    return path, recorded(config, generation)


def recorded(config: Any, generation: Any) -> dict[str, Any]:
    """A config as plain values that a checkpoint keeps; ids of the generation config win."""
    what: dict[str, Any] = config.to_dict()
    return what if generation is None else {**what, **{key: getattr(generation, key, None) for key in IDS}}


def fresh_config(given: dict[str, Any], spec: Spec, asker: Any) -> Any:
    """The config object of a dict; vocabulary and special tokens that it leaves out come from the data.

    Raises:
        ConfigError: no or an unknown ``model_type``, a key that the type does not know, the wrong family.
    """
    mine = type(asker).__name__
    transformers = _transformers(mine)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = given.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        kind = None if kind is None else str(kind)
        near = difflib.get_close_matches(kind or "", list(CONFIG_MAPPING.keys()), 1)
        said = "has no model_type" if kind is None else f"has model_type {kind!r}, which transformers does not know"
        raise ConfigError(f"{mine}.config {said}{f'; did you mean {near[0]}?' if near else ': name one, like llama'}")
    cls = CONFIG_MAPPING[kind]
    whole = "transformers_version" in given  # recorded, or copied from a config.json: takes its keys as they are
    if not whole:
        known = {*cls().to_dict(), *cls.attribute_map, *IDS}
        for key in given:
            near = difflib.get_close_matches(key, sorted(known), 1, 0.8)
            if key not in known and near:  # other unknown keys may be optional ones, read only where they are set
                raise ConfigError(f"{mine}.config has {key}, which {kind} does not know; did you mean {near[0]}?")
        data = {"vocab_size": spec.get("vocab_size"), "pad_token_id": spec.get("pad")}
        data |= {"bos_token_id": spec.get("bos"), "eos_token_id": spec.get("eos")}
        data["decoder_start_token_id"] = spec.get("bos")
        given = {**(data if spec else {}), **given}
    try:
        config = cls.from_dict(given)
    except Exception as error:  # validation raises the library's own kinds
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"{mine}.config: {reason}") from error
    if bool(config.is_encoder_decoder) != asker.crosses:
        other = "HFCausal" if asker.crosses else "HFSeq2Seq"
        raise ConfigError(f"{mine} does not take {kind}: use {other}")
    auto = transformers.AutoModelForSeq2SeqLM if asker.crosses else transformers.AutoModelForCausalLM
    if type(config) not in auto._model_mapping:
        raise ConfigError(f"{mine}: transformers has no such language model of type {kind}")
    return config
