"""Small language models with large random weights, so that their argmaxes are far apart and do not loop."""

from __future__ import annotations

import random
from types import SimpleNamespace

import torch

from quire.contracts import Spec, build
from quire.roles.language.contract import Draft, Drafter
from quire.roles.language.models import CausalLM

VOCAB, EOS = 50, 3
SHAPES = {
    "rope": {},
    "learned": {"rope": False},
    "window": {"window": 5},
    "llama": {"norm": "rms", "mlp": "swiglu", "qk_norm": True, "tie": False},
    "attention only": {"mlp": "none"},
}


def language_model(shape="rope", seed=0, width=32, depth=2, **spec):
    """A CausalLM of one of SHAPES in a namespace that stands for a Model."""
    torch.manual_seed(seed)
    model = CausalLM(width=width, depth=depth, heads=4, **SHAPES[shape])
    build(model, Spec({"vocab_size": VOCAB, "length": 64, "eos": EOS, "bos": 1, **spec}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return SimpleNamespace(decoder=model.eval(), encoder=None)


def prompts(lengths=(3, 7, 1, 12, 5), seed=1):
    """Prompts of the given lengths."""
    source = random.Random(seed)
    return [[source.randrange(4, VOCAB) for _ in range(n)] for n in lengths]


def batch(rows, side="right"):
    """A padded batch."""
    most = max(map(len, rows))
    fill = [[0] * (most - len(r)) for r in rows]
    ids = [r + f if side == "right" else f + r for r, f in zip(rows, fill)]
    real = [[True] * len(r) + [False] * len(f) for r, f in zip(rows, fill)]
    real = real if side == "right" else [m[::-1] for m in real]
    return {"tokens": torch.tensor(ids), "mask": torch.tensor(real)}


def recomputed(model, prompt, count):
    """Greedy by a whole forward pass for each token, no cache."""
    out = []
    while len(out) < count and (not out or out[-1] != EOS):
        with torch.no_grad():
            out.append(int(model.decoder(None, torch.tensor([prompt + out]))[0, -1].argmax()))
    return out


class Gambler(Drafter):
    """Random trees, six deep and two wide, whose right branch is really right most of the time."""

    def __init__(self, rows: list[list[int]], truth: list[list[int]], seed: int = 0):
        super().__init__()
        self.rows, self.truth, self.source = rows, truth, random.Random(seed)

    def propose(self, row, context, budget):
        at = len(context) - len(self.rows[row])
        tokens, parents, above = [], [], -1
        for token in self.truth[row][at : at + 6]:
            tokens += [
                self.source.randrange(VOCAB),
                token if self.source.random() < 0.8 else self.source.randrange(VOCAB),
            ]
            parents += [above, above]
            above = len(tokens) - 1
        return Draft(tokens, parents) if tokens else None
