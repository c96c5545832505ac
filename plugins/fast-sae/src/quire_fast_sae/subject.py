"""The subject ``tiny-chat``: a byte language model of generated dialogues and raw text, once per cache folder."""

from __future__ import annotations

import functools
import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.data import DataModule
from quire.datasets.activations.tiny import RECIPE, trained_once
from quire.datasets.text import TextTokens
from quire.roles.language.text import Tokenizer
from quire.roles.sites.subject import Subject
from quire_fast_sae.chats import ChatText
from quire_fast_sae.tokenizer import ChatBytes

STEPS = {"tiny-chat": 1500, "tiny-chat-20s": 200}
"""Training steps of each subject; two of three see dialogues, the third raw text."""


@functools.lru_cache(maxsize=4)
def tiny_chat(name: str) -> Subject:
    """The trained subject, frozen; one object a process."""
    from quire.checkpoint import load
    from quire.datasets.activations.opening import of_model

    return of_model(load(tiny_chat_folder(name)), name)


def tiny_chat_folder(name: str) -> Path:
    """The folder of the trained subject, an exported Quire model; trained on first use.

    Args:
        name: A key of ``STEPS``.
    """
    steps, chats = STEPS[name], line_chats()
    said = [RECIPE, steps, chats.tokenizer.fingerprint, _content(chats)]
    return trained_once(name, said, steps, lambda folder: _train(chats, steps, folder))


@functools.lru_cache(maxsize=1)
def line_chats() -> ChatText:
    """The dialogues that it is trained on, read and encoded once a process."""
    return ChatText("stdlib", max_tokens=RECIPE["length"], batch_size=RECIPE["rows"])


def raw_text(length: int, tokenizer: Tokenizer, **arguments: Any) -> TextTokens:
    """The standard library's text in blocks, of the same documents that the dialogues train on."""
    return TextTokens(length=length, tokenizer=tokenizer, **{"source": "stdlib", **arguments})


def _content(chats: ChatText) -> str:
    digest = hashlib.sha256()
    for dialogue in chats.dialogues()["train"]:
        digest.update("\n".join(turn["content"] for turn in dialogue).encode())
    return digest.hexdigest()[:12]


def _batch(data: DataModule, step: int, order: Tensor) -> dict[str, Tensor]:
    rows, split = RECIPE["rows"], data.dataset("train")
    start = step * rows % max(1, len(order) - rows)
    batch = split.__getitems__(order[start : start + rows].tolist())  # type: ignore[attr-defined]
    return {k: batch[k] for k in ("tokens", "mask")}  # the whole row is scored, not the answer alone


def _train(chats: ChatText, steps: int, folder: Path) -> None:
    """A plain loop, since it may run inside another run's set-up; the global random state is left as it was."""
    from quire.checkpoint import export
    from quire.model import Model
    from quire.roles.language.hf import HFCausal
    from quire.roles.language.next_token import NextToken

    raw = raw_text(RECIPE["length"], ChatBytes())
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(RECIPE["seed"])
        decoder = HFCausal(config={**RECIPE["config"], "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0})
        model = Model(decoder=decoder, objective=NextToken(), spec=chats.spec)
        model.configure_model()
        model.refer_tokenizer(chats.tokenizer)
        model.train()
        draws = torch.Generator().manual_seed(RECIPE["seed"])
        orders = [torch.randperm(len(d.dataset("train")), generator=draws) for d in (chats, raw)]  # type: ignore[arg-type]
        moving = torch.optim.AdamW(decoder.parameters(), lr=RECIPE["rate"], weight_decay=0.01, betas=(0.9, 0.99))
        for step in range(steps):
            batch = _batch(raw, step // 3, orders[1]) if step % 3 == 2 else _batch(chats, step, orders[0])
            warm, left = min(1.0, (step + 1) / 50), 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in moving.param_groups:
                group["lr"] = RECIPE["rate"] * warm * max(left, 0.05)
            loss = model.objective(model, batch)["next"]
            moving.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            moving.step()
        export(model.eval(), folder)
