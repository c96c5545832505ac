"""Our samplers inside ``model.generate`` of transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from quire.errors import ConfigError
from quire.roles.language.accept import Exact
from quire.roles.language.contract import Generated
from quire.roles.language.hf import Encoded, HFCausal, HFSeq2Seq
from quire.roles.language.loop import Speculative


def as_custom_generate(sampler: Speculative, streamer: Any = None) -> Callable[..., Any]:
    """A sampler as a decoding method of transformers: ``model.generate(..., custom_generate=as_custom_generate(s))``.

    ``generate`` prepares everything as ever: prompts, limits, end tokens, logits processors and stopping criteria are
    its own; drafts, acceptance, budget and seed are the sampler's. Processors run at each node with its own prefix.

    Args:
        sampler: ``Speculative``, ``Greedy`` or ``Sample``.
        streamer: A transformers streamer; ``generate`` itself hands none to a custom method. It gets several ids at
            once, one row only.

    Returns:
        A callable that gives what ``generate`` gives, ids [B,T] or its output object, with ``.stats`` on it.

    Raises:
        ConfigError: not such a sampler; and when called: beams, sampling asked of an exact rule, a cache that
            can't be cut or is not empty, outputs that the loop does not keep.
    """
    if not isinstance(sampler, Speculative):
        raise ConfigError(f"as_custom_generate takes Speculative, Greedy or Sample, got {type(sampler).__name__}")
    if sampler.strings:
        raise ConfigError("sampler.stop is not read here: give generate a StopStringCriteria")
    tried: WeakKeyDictionary[Any, Mapping[str, str]] = WeakKeyDictionary()  # a model's trial is run once

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        check(sampler, generation_config, model_kwargs)
        if streamer is not None and len(input_ids) > 1:
            raise ConfigError(f"a streamer takes one row, the batch has {len(input_ids)}")
        whole, mask = wrapped(model, generation_config, model_kwargs, tried.get(model))
        tried[model] = whole.decoder.caps().lacks
        lengths = [input_ids.shape[1]] * len(input_ids) if mask is None else mask.sum(1).tolist()
        inside = adapted(sampler, logits_processor, stopping_criteria, generation_config, input_ids, lengths)
        events = inside.stream(whole, {"tokens": input_ids, **({} if mask is None else {"mask": mask})})
        while True:
            try:
                _, ids = next(events)
            except StopIteration as end:
                made: Generated = end.value
                break
            if streamer is not None and ids:
                streamer.put(torch.tensor(ids))
        if streamer is not None:
            streamer.end()
        return output(model, input_ids, made, whole.decoder.caps().pad_id, generation_config)

    return decode


def check(sampler: Speculative, config: Any, model_kwargs: dict[str, Any]) -> None:
    """Refuse what the loop would ignore or get wrong."""
    if (config.num_beams or 1) > 1:
        raise ConfigError("speculative decoding is defined for greedy or sampling, not beams: set num_beams=1")
    if config.do_sample and isinstance(sampler.acceptance, Exact):
        raise ConfigError(
            "generate asks for sampling, the sampler's acceptance is Exact: use SampleOnce or do_sample=False"
        )
    if config.guidance_scale not in (None, 1.0):
        raise ConfigError("as_custom_generate takes no guidance_scale: use Sample with cfg")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise ConfigError(f"as_custom_generate keeps ids and statistics only: set {name}=False")
    cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
    if cache is not None and (getattr(cache, "is_compileable", False) or not getattr(cache, "is_croppable", True)):
        raise ConfigError(f"speculative decoding needs a croppable cache, not {type(cache).__name__}: use dynamic")
    if cache is not None and int(cache.get_seq_length()) > 0:
        raise ConfigError("as_custom_generate starts from ids: pass no cache that holds tokens already")
    if model_kwargs.get("inputs_embeds") is not None:
        raise ConfigError("as_custom_generate starts from ids: pass no inputs_embeds")


def adapted(
    sampler: Speculative, processors: Any, criteria: Any, config: Any, input_ids: Tensor, lengths: list[int]
) -> Speculative:
    """The sampler with this call's limit, processors and stopping criteria.

    Both are called as ``generate`` calls them: with the padded prompt in front, and with as many rows as the batch
    has, since some know their rows by number. Only the row in question is read.
    """
    made = copy.copy(sampler)
    made.max_new_tokens = max(0, config.max_length - input_ids.shape[1])
    made.max_total, made.strings = None, []
    others = [c for c in criteria if not hasattr(c, "max_length") and not hasattr(c, "eos_token_id")]

    def whole(row: int, new: list[int]) -> Tensor:
        ids = torch.cat([input_ids[row], torch.tensor(new, dtype=torch.long, device=input_ids.device)])
        return ids.expand(len(input_ids), -1).contiguous()

    def shape(row: int, prefix: list[int], logits: Tensor) -> Tensor:
        new = prefix[lengths[row] :]
        return processors(whole(row, new), logits.expand(len(input_ids), -1).clone())[row]

    def rule(row: int, emitted: list[int]) -> bool:
        ids = whole(row, emitted)
        return any(bool(torch.as_tensor(c(ids, None)).expand(len(ids))[row]) for c in others)

    made.shape, made.rule = shape if len(processors) else None, rule if others else None
    return made


def wrapped(
    model: Any, config: Any, model_kwargs: dict[str, Any], lacks: Mapping[str, str] | None
) -> tuple[Any, Tensor | None]:
    """The module as our samplers take it, and the prompt's mask."""
    mask = model_kwargs.get("attention_mask")
    mask = None if mask is None else mask.bool()
    if not model.config.is_encoder_decoder:
        return SimpleNamespace(decoder=HFCausal.of(model, generation=config, lacks=lacks), encoder=None), mask
    encoded = model_kwargs["encoder_outputs"].last_hidden_state
    codes = Encoded(encoded, None if mask is None or bool(mask.all()) else mask)
    own = model_kwargs.get("decoder_attention_mask")
    decoder = HFSeq2Seq.of(model, generation=config, lacks=lacks)
    return SimpleNamespace(decoder=decoder, encoder=lambda batch: codes), None if own is None else own.bool()


def output(model: Any, input_ids: Tensor, made: Generated, pad: int, config: Any) -> Any:
    """Prompts and continuations [B,T], padded behind, as ``generate`` returns them."""
    from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

    rows = [row[0] for row in made.tokens]
    longest = max((len(r) for r in rows), default=0)
    new = torch.tensor([r + [pad] * (longest - len(r)) for r in rows], dtype=torch.long, device=input_ids.device)
    sequences = torch.cat([input_ids, new.reshape(len(rows), longest)], 1)
    if not config.return_dict_in_generate:
        sequences.stats = made.stats  # type: ignore[attr-defined]
        return sequences
    kind: Any = GenerateEncoderDecoderOutput if model.config.is_encoder_decoder else GenerateDecoderOnlyOutput
    result: Any = kind(sequences=sequences)
    result.stats = made.stats
    return result
