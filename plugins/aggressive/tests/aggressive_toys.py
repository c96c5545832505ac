"""Models with large random weights, models that say what a script says, and sources that resemble their outputs."""

import functools
import random
from types import SimpleNamespace

import torch

from quire.contracts import Spec, build
from quire.roles.language.contract import Caps, DecodeState, StepModel
from quire.roles.language.hf import HFCausal, HFSeq2Seq
from quire.roles.language.loop import Greedy
from quire.roles.language.models import CausalLM, Seq2SeqDecoder
from quire.roles.language.rows import padded
from quire.roles.tokens.text import TextEncoder

VOCAB, BOS, EOS = 50, 1, 3
SPEC = {"vocab_size": VOCAB, "length": 64, "bos": BOS, "eos": EOS, "pad": 0, "mask_id": 2}
LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
CONFIGS = {
    "llama": {"model_type": "llama", **LLAMA},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "bart": {"model_type": "bart", "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
             "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
             "max_position_embeddings": 128, "forced_eos_token_id": None, "decoder_start_token_id": 2},
    "t5": {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
           "decoder_start_token_id": 0},
}  # fmt: skip
SEQ2SEQ = ("own seq2seq", "bart", "t5")
CAUSAL = ("own causal", "gpt2", "llama")


def wild(module, std=0.2):
    """Large random weights: argmaxes lie far apart and do not repeat."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std)
    return module.eval()


@functools.cache
def toy(name):
    """A built model in a namespace that stands for Model."""
    torch.manual_seed(0)
    encoder = None
    if name == "own seq2seq":
        encoder = TextEncoder(width=32, depth=1, heads=4, positions="rope", lm_head=False)
        build(encoder, Spec(SPEC))
        decoder = Seq2SeqDecoder(width=32, depth=2, heads=4)
        build(decoder, Spec({**SPEC, "codes": encoder.sizes()}))
        wild(encoder)
    elif name == "own causal":
        decoder = CausalLM(width=32, depth=2, heads=4)
        build(decoder, Spec(SPEC))
    else:
        ids = {"vocab_size": VOCAB, "eos_token_id": EOS, "bos_token_id": BOS, "pad_token_id": 0}
        decoder = (HFSeq2Seq if name in SEQ2SEQ else HFCausal)(config={**CONFIGS[name], **ids})
        build(decoder, Spec())
    return SimpleNamespace(decoder=wild(decoder), encoder=encoder)


def rows(lengths=(3, 7, 1, 12, 25), seed=1):
    draw = random.Random(seed)
    return [[draw.randrange(4, VOCAB) for _ in range(n)] for n in lengths]


def batch(name, sources):
    """Sources for an encoder, or as prompts behind a start token, marked as what may be copied."""
    if name in SEQ2SEQ:
        ids, mask = padded(sources, 0, torch.device("cpu"))
        return {"source": ids, "source_mask": torch.ones_like(ids, dtype=torch.bool) if mask is None else mask}
    ids, mask = padded([[BOS, *s] for s in sources], 0, torch.device("cpu"))
    span = torch.tensor([[1, 1 + len(s)] for s in sources])
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    return {"tokens": ids, "mask": mask, "source_span": span}


def greedy(model, given, count=30):
    return Greedy(count)(model, given)


class Said(StepModel):
    """Says a script: logit 9 for its next token at each place, whatever was read. Its passes are counted."""

    def __init__(self, scripts, vocab=VOCAB, **caps):
        super().__init__()
        self.scripts, self.passes = scripts, 0
        self._caps = Caps(vocab, **{"eos_ids": (EOS,), "start_id": BOS, **caps})

    def caps(self):
        return self._caps

    def _at(self, row, place):
        logits = torch.zeros(self._caps.vocab_size)
        script = self.scripts[row]
        logits[script[place] if place < len(script) else EOS] = 9.0
        return logits

    def open(self, prompt, mask=None, codes=None, max_length=None):
        lengths = torch.full((len(prompt),), prompt.shape[1]) if mask is None else mask.sum(1)
        order = list(range(len(prompt)))
        state = DecodeState(lengths, torch.stack([self._at(i, 0) for i in order]), None)
        state.extras = {"order": order, "start": lengths.tolist()}
        return state

    def step(self, state, ids, embeds=None, parents=None, valid=None):
        self.passes += 1
        out = torch.zeros(*ids.shape, self._caps.vocab_size)
        for b, row in enumerate(state.extras["order"]):
            depth = []
            for q in range(ids.shape[1]):
                above = q - 1 if parents is None else int(parents[b, q])
                depth.append(0 if above < 0 else depth[above] + 1)
                out[b, q] = self._at(row, int(state.lengths[b]) - state.extras["start"][b] + depth[q] + 1)
        return out

    def keep(self, state, chosen):
        state.lengths = state.lengths + (chosen >= 0).sum(1)

    def rows(self, state, order):
        state.lengths = state.lengths[order]
        for name in ("order", "start"):
            state.extras[name] = [state.extras[name][i] for i in order.tolist()]


def said(scripts, **caps):
    return SimpleNamespace(decoder=Said(scripts, **caps), encoder=None)
