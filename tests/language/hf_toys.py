"""Random transformers models from configs, with weights large enough that their argmaxes are far apart."""

from __future__ import annotations

import functools
import random
from types import SimpleNamespace

import torch

from quire.contracts import Spec, build
from quire.roles.language.contract import Draft, Drafter
from quire.roles.language.hf import HFCausal, HFSeq2Seq

VOCAB, EOS, LENGTHS = 60, 3, (3, 7, 1, 12, 5)
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "forced_eos_token_id": None,
    "decoder_start_token_id": 2,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
CONFIGS = {
    "llama": {"model_type": "llama", **LLAMA},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mistral": {"model_type": "mistral", **LLAMA, "sliding_window": 6},
    "qwen2": {
        "model_type": "qwen2",
        **LLAMA,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "bart": {"model_type": "bart", **BART},
    "t5": {"model_type": "t5", **T5},
    "bloom": {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4},  # distances counted in slots
    "umt5": {"model_type": "umt5", **T5},  # a bias that the adapter does not know
}
SEQ2SEQ = ("bart", "t5", "umt5")
EAGER = ("bloom",)
WHOLE = ("llama", "gpt2", "mistral", "qwen2", "bart", "t5")  # trees and ragged batches
CHAINS = ("bloom", "umt5")
CAUSAL = tuple(n for n in WHOLE if n not in SEQ2SEQ)


def adapter(name, eos=EOS, cache="full"):
    """A built adapter in eval mode."""
    ids = {"vocab_size": VOCAB, "eos_token_id": eos, "bos_token_id": 1, "pad_token_id": 0}
    cls = HFSeq2Seq if name in SEQ2SEQ else HFCausal
    attention = "eager" if name in EAGER else "sdpa"
    torch.manual_seed(0)
    made = cls(config={**CONFIGS[name], **ids}, attn_implementation=attention, cache=cache)
    build(made, Spec())
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return made.eval()


@functools.cache
def toy(name, eos=EOS, cache="full"):
    """The adapter in a namespace that stands for a Model; made once, never changed."""
    return SimpleNamespace(decoder=adapter(name, eos, cache), encoder=None)


def prompts(lengths=LENGTHS, seed=1):
    """Prompts, or sources, of the given lengths."""
    source = random.Random(seed)
    return [[source.randrange(4, VOCAB) for _ in range(n)] for n in lengths]


def batch(name, rows, side="right"):
    """A padded batch of prompts or sources."""
    most = max(map(len, rows))
    fill = [[0] * (most - len(r)) for r in rows]
    ids = [r + f if side == "right" else f + r for r, f in zip(rows, fill)]
    real = [[True] * len(r) + [False] * len(f) for r, f in zip(rows, fill)]
    real = real if side == "right" else [m[::-1] for m in real]
    keys = ("source", "source_mask") if name in SEQ2SEQ else ("tokens", "mask")
    return dict(zip(keys, (torch.tensor(ids), torch.tensor(real))))


@functools.cache
def reference(name, count=32, eos=EOS, lengths=LENGTHS):
    """What transformers' own greedy ``generate`` appends to each prompt, one by one."""
    module = toy(name, eos).decoder.module
    rows = []
    for prompt in prompts(lengths):
        ids = torch.tensor([prompt])
        made = module.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, num_beams=1
        )
        rows.append(made[0, 1 if name in SEQ2SEQ else len(prompt) :].tolist())
    return rows


def new_tokens(generated):
    """The one continuation of each row."""
    return [row[0] for row in generated.tokens]


def whole(model, codes, ids):
    """Logits [T,V] of one pass without a cache."""
    with torch.no_grad():
        return model(codes, torch.tensor([ids]))[0]


class ThreeChains(Drafter):
    """Three chains of three; in one of them each token is right 80% of the time."""

    def __init__(self, starts: list[int], truth: list[list[int]]):
        super().__init__()
        self.starts, self.truth, self.source = starts, truth, random.Random(0)

    def propose(self, row, context, budget):
        at = len(context) - self.starts[row]
        right = self.source.randrange(3)
        tokens, parents = [], []
        for chain in range(3):
            for depth in range(3):
                known = at + depth < len(self.truth[row]) and chain == right and self.source.random() < 0.8
                tokens.append(self.truth[row][at + depth] if known else self.source.randrange(VOCAB))
                parents.append(-1 if depth == 0 else len(tokens) - 2)
        return Draft(tokens, parents)
