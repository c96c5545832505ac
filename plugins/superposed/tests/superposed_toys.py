"""Small models with large random weights, so that argmaxes are far apart, and small stores."""

import functools
import random
from types import SimpleNamespace

import numpy as np
import torch

from quire.contracts import Spec, build
from quire.roles.language.hf import HFCausal, HFSeq2Seq
from quire.roles.language.models import CausalLM
from quire.roles.language.ngrams import NGramStore

VOCAB, EOS = 50, 3
CONFIGS = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    },
    "bart": {
        "model_type": "bart",
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 64,
        "forced_eos_token_id": None,
        "decoder_start_token_id": 2,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


def loud(module):
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return module.eval()


def whole(decoder, encoder=None):
    """A stand-in for Model."""
    return SimpleNamespace(decoder=decoder, encoder=encoder)


def language_model(seed=0, spec=None, **arguments):
    torch.manual_seed(seed)
    model = CausalLM(width=32, depth=2, heads=4, **arguments)
    build(model, Spec({"vocab_size": VOCAB, "length": 64, "eos": EOS, "bos": 1, **(spec or {})}))
    return whole(loud(model))


@functools.cache
def transformer(name):
    ids = {"vocab_size": VOCAB, "eos_token_id": EOS, "bos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    made = (HFSeq2Seq if name == "bart" else HFCausal)(config={**CONFIGS[name], **ids})
    build(made, Spec())
    return whole(loud(made))


def prompts(lengths=(3, 7, 1, 12, 5), seed=1, vocab=VOCAB):
    source = random.Random(seed)
    return [[source.randrange(4, vocab) for _ in range(n)] for n in lengths]


def batch(rows, side="right"):
    most = max(map(len, rows))
    fill = [[0] * (most - len(r)) for r in rows]
    ids = [r + f if side == "right" else f + r for r, f in zip(rows, fill)]
    real = [[True] * len(r) + [False] * len(f) for r, f in zip(rows, fill)]
    real = real if side == "right" else [m[::-1] for m in real]
    return {"tokens": torch.tensor(ids), "mask": torch.tensor(real)}


def counted(lengths=(1, 2, 3, 4, 5), seed=0, vocab=VOCAB, size=4000, fingerprint="", alphabet=None):
    """A store of random text; a small alphabet makes contexts repeat."""
    source = np.random.default_rng(seed)
    letters = np.arange(4, vocab) if alphabet is None else np.asarray(alphabet)
    store = NGramStore(orders=list(lengths))
    store.add([source.choice(letters, size // 4).tolist() for _ in range(4)], vocab, fingerprint)
    return store


def saved(tmp_path, **how):
    return str(counted(**how).save(tmp_path / "ngrams.safetensors"))
