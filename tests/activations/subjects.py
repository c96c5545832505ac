"""Small subjects with random weights, and text for them; nothing is trained."""

from __future__ import annotations

import torch
from tests.language.hf_toys import CONFIGS, VOCAB

from quire.contracts import Spec, build
from quire.data import DataModule, Fields
from quire.datasets.activations.module import Activations
from quire.roles.language.hf import HFCausal
from quire.roles.language.models import CausalLM
from quire.roles.sites.subject import Subject


def transformers_model(kind="gpt2", **more):
    """A random language model of transformers, in eval mode."""
    config = {**CONFIGS[kind], "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0, **more}
    torch.manual_seed(0)
    made = HFCausal(config=config, attn_implementation="eager" if kind == "bloom" else "sdpa")
    build(made, Spec())
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return made.eval()


def quire_model(**more):
    """A random CausalLM."""
    torch.manual_seed(0)
    made = CausalLM(**{"width": 32, "depth": 3, "heads": 4, "rope": False, **more})
    build(made, Spec({"vocab_size": VOCAB, "length": 64, "eos": 3, "bos": 1}))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return made.eval()


def subject(kind="gpt2", **more):
    """A subject of one of the kinds, or ``quire``."""
    return Subject(quire_model(**more) if kind == "quire" else transformers_model(kind, **more), kind)


def tokens(rows=3, length=9, seed=0):
    """A batch without padding."""
    source = torch.Generator().manual_seed(seed)
    return {"tokens": torch.randint(4, VOCAB, (rows, length), generator=source)}


class Ids(DataModule):
    """Rows of random ids, some of them special, some of them padding."""

    fields = ("tokens", "mask", "special", "label")

    def __init__(self, samples=40, length=12, ragged=False, specials=True, silent=False, **kwargs):
        super().__init__(**{"batch_size": 4, **kwargs})
        self.samples, self.length, self.ragged, self.specials, self.silent = samples, length, ragged, specials, silent

    def sizes(self):
        return {"vocab_size": VOCAB, "length": self.length, "bos": 1, "eos": 3, "pad": 0}

    def split(self, name):
        source = torch.Generator().manual_seed(("train", "val", "test").index(name))
        count = self.samples if name == "train" else self.samples // 2
        ids = torch.randint(4, VOCAB, (count, self.length), generator=source)
        mask = torch.ones_like(ids, dtype=torch.bool)
        if self.ragged:
            most = torch.randint(2, self.length + 1, (count, 1), generator=source)
            mask = torch.arange(self.length) < most
        special = torch.zeros_like(mask)
        special[:, 0] = self.specials
        special |= self.silent
        label = torch.arange(count) % 3
        return Fields(tokens=ids.where(mask, torch.zeros_like(ids)), mask=mask, special=special, label=label)


def feed(**arguments):
    """An Activations on a small random subject."""
    given = {"subject": None, "site": "blocks.0.resid", "batch_size": 16, "buffer": 64, "contexts": 4, **arguments}
    if given["subject"] is None and "folder" not in given:
        given["subject"] = transformers_model()
    if "folder" not in given:
        given.setdefault("source", Ids())
    return Activations(**given)
