"""Small language models with large random weights, whose argmaxes are far apart."""

import random
from types import SimpleNamespace

import torch

from quire.contracts import Spec, build
from quire.roles.language.contract import Caps, DecodeState, StepModel
from quire.roles.language.models import CausalLM

VOCAB, EOS = 50, 3


def language_model(seed=0, **arguments):
    torch.manual_seed(seed)
    model = CausalLM(width=32, depth=2, heads=4, **arguments)
    build(model, Spec({"vocab_size": VOCAB, "length": 64, "eos": EOS, "bos": 1}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return SimpleNamespace(decoder=model.eval(), encoder=None)


def prompts(lengths=(3, 7, 1, 12, 5), seed=1):
    source = random.Random(seed)
    return [[source.randrange(4, VOCAB) for _ in range(n)] for n in lengths]


class Memoryless(StepModel):
    """Every token follows the same law, whatever came before."""

    def __init__(self, law, **caps):
        super().__init__()
        self.logits = torch.tensor(law).log()
        self._caps = Caps(len(law), **caps)

    def caps(self):
        return self._caps

    def open(self, prompt, mask=None, codes=None, max_length=None):
        count = len(prompt)
        return DecodeState(torch.full((count,), prompt.shape[1]), self.logits.repeat(count, 1), None)

    def step(self, state, ids, embeds=None, parents=None, valid=None):
        return self.logits.repeat(*ids.shape, 1)

    def keep(self, state, chosen):
        state.lengths = state.lengths + (chosen >= 0).sum(1)

    def rows(self, state, order):
        state.lengths = state.lengths[order]
