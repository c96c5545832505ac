"""The models that the claim decodes with: two that correct sentences, one that spells numbers, and a block drafter."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import seed_everything

from quire.contracts import Batch
from quire.data import DataModule
from quire.datasets.corrupted import CorruptedText
from quire.datasets.pairs import Pairs
from quire.model import Model
from quire.reproduce import arm_trainer, quiet
from quire.roles.language.hf import HFCausal
from quire.roles.language.models import Seq2SeqDecoder
from quire.roles.language.next_token import NextToken, Seq2SeqTokens
from quire.roles.language.text import BPE
from quire.roles.tokens.text import TextEncoder
from quire.schedule import WarmupCosine
from quire_aggressive.block import BlockDrafter
from quire_aggressive.objective import BlockPrediction

BLOCK = 8


@dataclass
class Trial:
    """A trained model and the rows that it decodes, one batch each."""

    model: Model
    batches: list[Batch]
    limit: int
    drafter: BlockDrafter | None = None
    untrained: BlockDrafter | None = None


def sentences(quick: bool, causal: bool) -> CorruptedText:
    """Sentences of the standard library's reference with slips in 5 to 10 % of the words."""
    length, size = (24, 300) if quick else (40, 1024)
    batch: dict[str, Any] = {"batch_size": 8, "train_samples": 64} if quick else {"batch_size": 32}
    return CorruptedText(
        source="stdlib:docs", unit="sentence", length=length, tokenizer=BPE(size), causal=causal, **batch
    )


@functools.lru_cache(maxsize=1)
def correction(quick: bool) -> Trial:
    """An encoder-decoder that corrects sentences."""
    width, depth, heads = (32, 1, 2) if quick else (128, 2, 4)
    model = Model(
        encoder=TextEncoder(width=width, depth=depth, heads=heads, positions="rope", lm_head=False),
        decoder=Seq2SeqDecoder(width=width, depth=depth, heads=heads),
        objective=Seq2SeqTokens(smoothing=0.0),
        optimizer=_adam,
        schedule=WarmupCosine(),
    )
    return _trained(
        model, sentences(quick, False), 20 if quick else 1600, 4 if quick else 90, shortest=2 if quick else 20
    )


@functools.lru_cache(maxsize=1)
def causal_correction(quick: bool) -> Trial:
    """A decoder-only transformers model that corrects the sentence in its prompt: peers' code runs on it too."""
    width, depth, heads = (32, 1, 2) if quick else (128, 3, 4)
    config = {"model_type": "llama", "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
              "num_key_value_heads": heads, "intermediate_size": 3 * width, "max_position_embeddings": 256}  # fmt: skip
    model = Model(decoder=HFCausal(config=config), objective=NextToken(), optimizer=_adam, schedule=WarmupCosine())
    return _trained(
        model, sentences(quick, True), 20 if quick else 900, 4 if quick else 90, shortest=2 if quick else 20
    )


@functools.lru_cache(maxsize=1)
def spelling(quick: bool) -> Trial:
    """An encoder-decoder that spells numbers, a block drafter trained on the same pairs, and an untrained one."""
    width, depth, heads = (32, 1, 2) if quick else (128, 2, 4)
    data = Pairs(samples=200 if quick else 8192, tokenizer=BPE(300), batch_size=8 if quick else 64)
    model = Model(
        encoder=TextEncoder(width=width, depth=depth, heads=heads, positions="sincos", lm_head=False),
        decoder=Seq2SeqDecoder(width=width, depth=depth, heads=heads),
        objective=Seq2SeqTokens(smoothing=0.0),
        optimizer=_adam,
        schedule=WarmupCosine(),
    )
    trial = _trained(model, data, 20 if quick else 300, 4 if quick else 90, shortest=2 if quick else 12)
    drafters = []
    for steps in (20 if quick else 700, 0):
        guess = Model(
            decoder=BlockDrafter(BLOCK, width, [depth, depth], heads, 0.0),
            objective=BlockPrediction(smoothing=0.0),
            optimizer=_adam,
            schedule=WarmupCosine(),
        )
        _fit(guess, data, steps)
        guess.decoder.trained.fill_(True)  # the untrained one is a control, asked for on purpose
        drafters.append(guess.decoder.eval())
    trial.drafter, trial.untrained = drafters
    return trial


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)


def _fit(model: Model, data: DataModule, steps: int) -> None:
    seed_everything(0, verbose=False)
    with quiet():
        if steps:
            arm_trainer(max_steps=steps, gradient_clip_val=1.0).fit(model, datamodule=data)
        else:
            model.spec = type(data.spec)(data.spec)
            model.configure_model()
    model.eval()


def _trained(model: Model, data: Any, steps: int, count: int, shortest: int = 1) -> Trial:
    """Train, and take the first ``count`` test rows whose target has at least ``shortest`` tokens."""
    _fit(model, data, steps)
    rows: list[Batch] = []
    split = data.split("test")
    for i in range(len(split)):
        one = {name: value[None] for name, value in split[i].items()}
        target = one["mask"].sum() - one.get("prompt_length", torch.tensor([1])).sum()
        if int(target) >= shortest:
            rows.append({**one, "index": torch.tensor([i])})
        if len(rows) == count:
            break
    longest = max(int(r["mask"].sum() - r.get("prompt_length", torch.tensor([1])).sum()) for r in rows)
    return Trial(model, rows, longest + 16)
