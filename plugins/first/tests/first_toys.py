"""Small models of every kind with large random weights, wrapped; and the same models with layers deleted."""

import copy
import functools
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from quire.contracts import Spec, build
from quire.plugins import load
from quire.roles.language.hf import Encoded, HFCausal, HFSeq2Seq
from quire.roles.language.models import CausalLM, Seq2SeqDecoder
from quire_first.model import RoutedModel

VOCAB, EOS, DEPTH, WIDTH = 60, 3, 4, 32
LLAMA = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
BART = {
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": DEPTH,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "forced_eos_token_id": None,
    "decoder_start_token_id": 2,
}
T5 = {
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": DEPTH,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
CONFIGS = {
    "llama": {"model_type": "llama", **LLAMA},
    "gpt2": {"model_type": "gpt2", "n_embd": WIDTH, "n_layer": DEPTH, "n_head": 4, "n_positions": 64},
    "mistral": {"model_type": "mistral", **LLAMA, "sliding_window": 6},
    "bart": {"model_type": "bart", **BART},
    "t5": {"model_type": "t5", **T5},
}
SOURCED = ("seq2seq", "bart", "t5", "universal seq2seq")
OWN = ("causal", "seq2seq", "universal", "universal seq2seq")
ALL = (*OWN, *CONFIGS)


def installed(name):
    """Another plugin's component, or a skip where that plugin is missing."""
    entry = load().registry.entries.get(name)
    if entry is None:
        pytest.skip(f"the plugin with {name} is not installed")
    return entry.load()


def base(name, **arguments):
    """An unbuilt base."""
    if name in ("causal", "seq2seq"):
        return (CausalLM if name == "causal" else Seq2SeqDecoder)(width=WIDTH, depth=DEPTH, heads=4, **arguments)
    if name.startswith("universal"):
        return installed("UniversalDecoder")(width=WIDTH, heads=4, ffn=64, steps=DEPTH, dropout=0.0, **arguments)
    ids = {"vocab_size": VOCAB, "eos_token_id": EOS, "bos_token_id": 1, "pad_token_id": 0}
    return (HFSeq2Seq if name in SOURCED else HFCausal)(config={**CONFIGS[name], **ids}, **arguments)


def routed(name="causal", seed=0, loud=True, base_arguments=None, **arguments):
    """A built RoutedModel in eval mode whose routers disagree among prompts where ``loud``."""
    torch.manual_seed(seed)
    made = RoutedModel(base(name, **(base_arguments or {})), **arguments)
    spec = Spec({"vocab_size": VOCAB, "length": 64, "eos": EOS, "bos": 1})
    build(made, Spec({**spec, "codes": {"width": WIDTH}}) if name.endswith("seq2seq") else spec)
    with torch.no_grad():
        for parameter in made.base.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
        if loud:
            made.routers.weight.normal_(std=1.0)
            made.routers.bias.zero_()
    return made.eval()


def without(made, *gone):
    """A copy of the base with layers deleted, as a routed model without routing: ``force`` of nothing."""
    other = copy.deepcopy(made)
    holder, name = other.stack.holder, other.stack.name
    kept = [layer for i, layer in enumerate(other.stack.layers) if i not in gone]
    setattr(holder, name, nn.ModuleList(kept))
    inside = other.base
    if hasattr(inside, "depth"):
        inside.depth = len(kept)
    if getattr(inside, "module", None) is not None:
        config = inside._decoder_config
        for key in ("num_hidden_layers", "num_decoder_layers", "n_layer", "decoder_layers"):
            if key in config.to_dict():
                setattr(config, key, len(kept))
        for i, layer in enumerate(kept):
            for module in layer.modules():
                if getattr(module, "layer_idx", None) is not None:
                    module.layer_idx = i
    return inside


def codes(name, rows, seed=5, lengths=None):
    """The source's codes for a sourced model, else None."""
    if name not in SOURCED:
        return None
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, 6, WIDTH, generator=generator)
    mask = None
    if lengths is not None:
        mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    return Encoded(values, mask)


def prompts(lengths=(3, 7, 1, 12, 5), seed=1):
    """Prompts of the given lengths."""
    source = random.Random(seed)
    return [[source.randrange(4, VOCAB) for _ in range(n)] for n in lengths]


def padded(rows, side="right"):
    """Ids and mask."""
    most = max(map(len, rows))
    fill = [[0] * (most - len(r)) for r in rows]
    ids = [r + f if side == "right" else f + r for r, f in zip(rows, fill)]
    real = [[True] * len(r) + [False] * len(f) for r, f in zip(rows, fill)]
    real = real if side == "right" else [m[::-1] for m in real]
    return torch.tensor(ids), torch.tensor(real)


@torch.no_grad()
def generate(model, rows, count=8, codes=None, side="right", steps=None):
    """Greedy ids of each row by open and step alone, and the state."""
    ids, mask = padded(rows, side)
    state = model.open(ids, mask, codes)
    out = [state.logits.argmax(-1)]
    for _ in range(count - 1):
        logits = model.step(state, out[-1][:, None])
        model.keep(state, torch.zeros(len(rows), 1, dtype=torch.long))
        out.append(logits[:, 0].argmax(-1))
        if steps is not None:
            steps.append(state.extras["routing"].on.clone())
    return torch.stack(out, 1).tolist(), state


def whole(decoder, encoder=None):
    """What stands for a Model."""
    return SimpleNamespace(decoder=decoder, encoder=encoder)


@functools.cache
def toy(name, **arguments):
    """A routed model, made once, never changed."""
    return routed(name, **arguments)
