"""The source of a plugin without a fault: a step model that recomputes everything, a drafter, an acceptance rule."""

from __future__ import annotations

from tests.conformance.healthy import HOOKS, table

TABLE = {"decoder": ("TalkNN", "StepModel"), "part": ("GuessNN", "drafter")}
RULE = 'register("quire_planted_NN.parts.RuleNN", "part", "acceptance")'

PARTS = '''
"""Components. Doe et al. 2024."""

import torch
from torch import nn

from quire.roles.language.contract import Acceptance, Caps, DecodeState, Draft, Drafter, StepModel


def run():
    sampler = {"drafter": "GuessNN", "acceptance": "RuleNN", "max_new_tokens": 4}
    sampler = {"class_path": "Speculative", "init_args": sampler}
    data = {"source": "stdlib:docs", "length": 32, "batch_size": 4, "train_samples": 16}
    model = {"decoder": "TalkNN", "objective": "NextToken", "sampler": sampler}
    return {"model": model, "data": {"class_path": "TextTokens", "init_args": data}}


class TalkNN(StepModel):
    """Reads a bent mean of everything before. Doe et al. 2024.

    Returns:
        Logits [B,T,V].
    """

    tiny = staticmethod(run)

    def build(self, spec):
        vocab = spec.need("vocab_size", self)
        self._caps = Caps(vocab, eos_ids=(spec["eos"],), pad_id=spec["pad"], start_id=spec["bos"])
        self.token, self.place, self.out = nn.Embedding(vocab, 16), nn.Embedding(128, 16), nn.Linear(32, vocab)

    def caps(self):
        return self._caps

    def embed(self, ids):
        return self.token(ids)

    def read(self, x):
        """Logits [V] behind one sequence [T,16]."""
        places = torch.arange(len(x))
        x = x + self.place(places)
        return self.out(torch.cat([torch.tanh(x).sum(0) / 3, x[-1]]))

    def forward(self, codes, tokens, mask=None):
        x, rows = self.token(tokens), []
        x = x + self.place(torch.arange(x.shape[1]))
        return self.out(torch.cat([torch.tanh(x).cumsum(1) / 3, x], -1))

    def open(self, prompt, mask=None, codes=None, max_length=None):
        real = torch.ones_like(prompt, dtype=torch.bool) if mask is None else mask
        held = [self.token(ids[m]) for ids, m in zip(prompt, real)]
        logits = torch.stack([self.read(x) for x in held])
        return DecodeState(real.sum(1), logits, held)

    def step(self, state, ids, embeds=None, parents=None, valid=None):
        x = self.token(ids) if ids is not None else embeds
        rows, count, width = [], x.shape[0], x.shape[1]
        for b in range(count):
            line = []
            for slot in range(width):
                path, at = [], slot
                while at >= 0:
                    path, at = [at, *path], at - 1 if parents is None else int(parents[b, at])
                line.append(self.read(torch.cat([state.cache[b], x[b, path]])))
            rows.append(torch.stack(line))
        state.extras["new"] = x
        return torch.stack(rows)

    def keep(self, state, chosen):
        for b, row in enumerate(chosen.tolist()):
            kept = [slot for slot in row if slot >= 0]
            state.cache[b] = torch.cat([state.cache[b], state.extras["new"][b, kept]])
        state.lengths = torch.tensor([len(x) for x in state.cache])

    def open_drafted(self, draft, prompt, mask=None, codes=None, max_length=None):
        state = self.open(prompt, mask)
        logits = torch.cat([state.logits[:, None], self.step(state, draft)], 1)
        self.keep(state, torch.arange(draft.shape[1]).expand(len(draft), -1))
        state.logits = logits
        return state

    def cut(self, state, lengths):
        state.cache = [x[:n] for x, n in zip(state.cache, lengths.tolist())]
        state.lengths = lengths

    def rows(self, state, order):
        state.cache = [state.cache[i] for i in order.tolist()]
        state.lengths = state.lengths[order]
        state.logits = state.logits[order]


class GuessNN(Drafter):
    """Repeats the last tokens. Doe et al. 2024."""

    tiny = staticmethod(run)

    def begin(self, model, prompts, sources):
        self.first = [p[0] for p in prompts]

    def propose(self, row, context, budget):
        tail = context[-2:]
        tokens = tail[:budget]
        return Draft(tokens, [-1] * len(tokens))

    def observe(self, row, context, accepted, rejected):
        pass


class RuleNN(Acceptance):
    """Samples once behind each accepted node. Doe et al. 2024."""

    lossless = True
    tiny = staticmethod(run)

    def first(self, logits, generator):
        return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))

    def choose(self, logits, draft, generator):
        nodes, at = [], -1
        while True:
            token = self.first(logits[at + 1], generator)
            found = [i for i, p in enumerate(draft.parents) if p == at and draft.tokens[i] == token]
            if not found:
                return nodes, token
            at = found[0]
            nodes.append(at)
'''


def language_plugin() -> dict[str, str]:
    """Files of the plugin."""
    hooks = HOOKS.replace("REGISTER", f"{table(TABLE)}\n    {RULE}")
    return {"__init__.py": hooks, "parts.py": PARTS}
