"""What every arm of the claim shares: a trained model, n-gram counts, prefixes and what follows them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import seed_everything

from quire.datasets.text import TextTokens, standard_library
from quire.model import Model
from quire.reproduce import arm_trainer, quiet
from quire.roles.language.models import CausalLM
from quire.roles.language.next_token import NextToken
from quire.roles.language.ngrams import NGramStore
from quire.roles.language.text import BPE
from quire_superposed.presets import LENGTHS

PROMPT, NEW = 15, 10


@dataclass(eq=False)
class Trial:
    """One seed's model and what it is asked."""

    model: Model
    store: NGramStore
    prompts: list[list[int]]
    truths: list[list[int]]


class _Texts(TextTokens):
    given: dict[str, list[str]]

    def documents(self) -> dict[str, list[str]]:
        return self.given


@functools.lru_cache(maxsize=1)
def trained(seed: int, quick: bool) -> Trial:
    """Train a model, count n-grams of the same documents, take prefixes evenly from the documents held out."""
    seed_everything(seed, verbose=False)
    code, prose = standard_library("stdlib:code"), standard_library("stdlib:docs")
    if quick:
        code, prose = code[:12], prose[:40]
    texts = [*code, *prose]
    held = [*code[9::10], *prose[9::10]]
    train = [t for t in texts if t not in set(held)]
    data = _Texts(length=128, batch_size=16, seed=seed, tokenizer=BPE(512 if quick else 4096))
    data.given = {"train": train, "val": held, "test": held}
    shape: dict[str, Any] = {"width": 48, "depth": 2, "heads": 2} if quick else {"width": 256, "depth": 6, "heads": 8}
    model = Model(decoder=CausalLM(**shape), objective=NextToken())
    with quiet():
        trainer = arm_trainer(max_steps=20 if quick else 300)
        trainer.fit(model, datamodule=data)
    model.eval()
    tok = data.tokenizer
    store = NGramStore(orders=list(LENGTHS))
    end = [] if tok.eos is None else [tok.eos]
    store.add([[*tok.encode(t), *end] for t in train], tok.vocab_size, tok.fingerprint)
    stream = [i for text in held for i in tok.encode(text)]
    count = 10 if quick else 200
    gap = (len(stream) - PROMPT - NEW) // count
    starts = [i * gap for i in range(count)]
    prompts = [stream[s : s + PROMPT] for s in starts]
    return Trial(model, store, prompts, [stream[s + PROMPT : s + PROMPT + NEW] for s in starts])
