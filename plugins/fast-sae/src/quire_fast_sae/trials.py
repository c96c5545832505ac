"""What the claim's arms share: the subject, the scale of activations, the dictionary and how it is judged."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from quire.contracts import Batch, Part
from quire.data import DataModule
from quire.model import Model
from quire.reproduce import arm_trainer, quiet
from quire.roles.sites.subject import Subject
from quire.roles.sparse.card import Card, Seen, measure
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.objective import SparseReconstruction
from quire.roles.sparse.selectors import TopK
from quire_fast_sae.blocks import BlockActivations, Joined
from quire_fast_sae.instances import InstructActivations
from quire_fast_sae.metrics import SequenceMSE, SpecialTokenMSE
from quire_fast_sae.subject import line_chats, tiny_chat

SITE, LATENTS, K = "blocks.1.resid", 384, 8
TOKENS, STEPS = 512, 700


class Standardised(Part):
    """Activations less a mean, over a scale; the same for every arm.

    Args:
        mean: D numbers.
        scale: One number.
    """

    def __init__(self, mean: list[float], scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("mean", torch.tensor(mean))

    def forward(self, batch: Batch, generator: Any = None) -> Batch:
        """The batch with its activations standardised."""
        return {**batch, "activation": (batch["activation"] - self.mean) / self.scale}


class Around(nn.Module):
    """A dictionary trained on standardised activations, for activations as they are.

    Args:
        part: Its encoder or decoder.
        standard: What its activations went through.
    """

    def __init__(self, part: nn.Module, standard: Standardised) -> None:
        super().__init__()
        self.part, self.standard = part, standard

    def forward(self, given: Any) -> Any:
        """Batch → codes, or codes → activations."""
        if isinstance(given, dict):
            return self.part(self.standard(given))
        return self.part(given) * self.standard.scale + self.standard.mean


@dataclass
class Shared:
    """What all arms of a process have in common."""

    subject: Subject
    held: InstructActivations
    standard: Standardised


def feed(kind: str, subject: Any, seed: int, **more: Any) -> DataModule:
    """One arm's data: ``raw`` text or dialogues in ``blocks``, or ``instances``."""
    same = {"batch_size": TOKENS, "buffer": 65_536, "seed": seed, **more}
    if kind == "instances":
        return InstructActivations(subject, SITE, line_chats(), **same)
    if kind == "blocks":
        return BlockActivations(subject, SITE, Joined(line_chats(), subject.context or 64, seed), **same)
    return BlockActivations(subject, SITE, templated=False, **same)


@functools.lru_cache(maxsize=2)
def shared(quick: bool) -> Shared:
    """The subject, trained once per cache folder, and the mean and scale of its activations on dialogues."""
    subject: Any = tiny_chat("tiny-chat-20s" if quick else "tiny-chat")
    held = InstructActivations(subject, SITE, line_chats(), batch_size=4096)
    rows = []
    with quiet():
        chunks = held.forwards("train")
        for what in chunks.plan(0, True)[: 4 if quick else 32]:
            rows.append(chunks.read(what)["activation"])
    x = torch.cat(rows)
    mean = x.mean(0)
    scale = math.sqrt(float((x - mean).square().mean()))
    return Shared(subject, held, Standardised(mean.tolist(), scale))


def trained(kind: str, seed: int, quick: bool) -> tuple[Model, Shared]:
    """A dictionary of one arm: the same tokens, size and sparsity for all."""
    common, steps = shared(quick), 24 if quick else STEPS
    seed_everything(seed, verbose=False)
    data = feed(kind, common.subject, seed, transforms=[common.standard])
    encoder = SparseEncoder(LATENTS, TopK(K))
    made = Model(encoder, SparseDecoder(), SparseReconstruction(auxk=0.0), optimizer=adam)
    with quiet():
        trainer = arm_trainer(max_steps=steps)
        trainer.fit(made, datamodule=data)
    return made.eval(), common


def adam(parameters: Any) -> torch.optim.Optimizer:
    """As role-sparse: 2e-4 over the root of latents by 2 to the 14."""
    return torch.optim.Adam(parameters, lr=2e-4 / math.sqrt(LATENTS / 2**14))


def judged(model: Model, common: Shared, quick: bool) -> Card:
    """The card on held-out dialogues, in the subject's own units, with the errors of special tokens."""
    encoder, decoder = Around(model.encoder, common.standard), Around(model.decoder, common.standard)
    extra: list[Any] = [SequenceMSE(log2=False), SpecialTokenMSE(log2=False), token_error]
    with quiet():
        return measure(encoder, decoder, common.held, tokens=4000 if quick else 100_000, extra=extra)


def token_error(seen: Seen) -> dict[str, Tensor]:
    """[N] squared error of each token, the mean over the width: what the pilot averaged over tokens."""
    return {"token_mse": (seen.made - seen.x).square().mean(1)}
