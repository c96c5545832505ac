"""Language models whose probabilities are known, and cubes over them."""

import torch

from quire.contracts import Spec, build
from quire.roles.language.contract import Caps, DecodeState, StepModel
from quire_ariel.decoder import VolumeDecoder
from quire_ariel.recurrent import GRULanguageModel

PAD, BOS, EOS, A, B, C = range(6)


class Table(StepModel):
    """Next-token probabilities by a function of the prefix (a tuple of ids without the start token)."""

    def __init__(self, law, vocab=6):
        super().__init__()
        self.law, self._caps = law, Caps(vocab, eos_ids=(EOS,), pad_id=PAD, start_id=BOS)
        self.passes = 0

    def caps(self):
        return self._caps

    def build(self, spec):
        """Nothing depends on the data."""

    def logits(self, prefix):
        p = torch.zeros(self._caps.vocab_size, dtype=torch.float64)
        for token, share in self.law(prefix).items():
            p[token] = share
        return p.log().float()

    def forward(self, codes, tokens, mask=None):
        self.passes += 1
        return torch.stack(
            [torch.stack([self.logits(tuple(row[1 : t + 1])) for t in range(len(row))]) for row in tokens.tolist()]
        )

    def open(self, prompt, mask=None, codes=None, max_length=None):
        held = [tuple(row[1:]) for row in prompt.tolist()]
        return DecodeState(torch.ones(len(held), dtype=torch.long), torch.stack(list(map(self.logits, held))), held)

    def step(self, state, ids, embeds=None, parents=None, valid=None):
        state.extras["next"] = [(*h, i) for h, i in zip(state.cache, ids[:, 0].tolist())]
        return torch.stack([self.logits(h) for h in state.extras["next"]])[:, None]

    def keep(self, state, chosen):
        state.cache = state.extras["next"]
        state.lengths = state.lengths + 1

    def rows(self, state, order):
        state.cache = [state.cache[i] for i in order.tolist()]
        state.lengths, state.logits = state.lengths[order], state.logits[order]


def constant(**shares):
    """The same law everywhere: a, b, c, eos."""
    ids = {"a": A, "b": B, "c": C, "eos": EOS}
    return lambda prefix: {ids[k]: v for k, v in shares.items()}


def language(*sentences):
    """A finite language: every continuation that leads to one of these (word, weight) is drawn by weight."""

    def law(prefix):
        weights = {}
        for words, weight in sentences:
            if words[: len(prefix)] == prefix and len(words) > len(prefix):
                weights[words[len(prefix)]] = weights.get(words[len(prefix)], 0) + weight
        total = sum(weights.values())
        return {t: w / total for t, w in weights.items()} or {EOS: 1.0}

    return law


def over(model, dims=2, spec=None, **arguments):
    """A cube over a model."""
    made = VolumeDecoder(model, latent_dim=dims, **arguments)
    build(made, Spec(spec or {}))
    return made.eval()


def loud_gru(vocab=30, seed=0, scale=0.4):
    """An untrained GRU whose probabilities differ widely."""
    torch.manual_seed(seed)
    model = GRULanguageModel(width=24, embedding=12)
    build(model, Spec({"vocab_size": vocab, "length": 64, "pad": PAD, "bos": BOS, "eos": EOS}))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=scale)
    return model.eval()


def random_sentences(count, vocab=30, longest=10, seed=0):
    """Rows with start and end tokens, right-padded, and their mask."""
    source = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=source)
    tokens = torch.randint(A, vocab, (count, longest + 2), generator=source)
    tokens[:, 0] = BOS
    tokens[torch.arange(count), lengths + 1] = EOS
    mask = torch.arange(longest + 2) <= lengths[:, None] + 1
    return tokens * mask, mask


def bodies(tokens, mask):
    """Ids behind the start token, the end token included."""
    return [t[m].tolist()[1:] for t, m in zip(tokens, mask)]


def rows(*sentences):
    """Ids as a batch of equally long rows."""
    return torch.tensor([list(s) for s in sentences])
