"""A small model with an induction head, and whether latents of that head look where it looks (arXiv 2406.17759)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.data import DataModule, Fields
from quire.datasets.activations.module import Activations
from quire.model import Model
from quire.roles.language.models import CausalLM
from quire.roles.language.next_token import NextToken
from quire.roles.sites.subject import Subject
from quire_attn_sae.dfa import Firings, entries, linear
from quire_attn_sae.heads import head_shares

VOCAB, LENGTH, HEADS, SITE = 40, 48, 4, "blocks.1.z"


class Repeats(DataModule):
    """Random tokens, all different, said again and again with a period of 8 to 20.

    Args:
        samples: Training rows; validation and test have 128 each.
        **kwargs: Arguments of ``DataModule``.
    """

    fields = ("tokens", "mask")

    def __init__(self, samples: int = 2048, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.samples = samples

    def sizes(self) -> dict[str, Any]:
        """vocab_size and length."""
        return {"vocab_size": VOCAB, "length": LENGTH}

    def split(self, name: str) -> Fields:
        """Draw one split."""
        source = torch.Generator().manual_seed(("train", "val", "test").index(name))
        tokens = draw(self.samples if name == "train" else 128, source)
        return Fields(tokens=tokens, mask=torch.ones_like(tokens, dtype=torch.bool))


def draw(count: int, source: torch.Generator) -> Tensor:
    """[count,LENGTH] repeated sequences."""
    rows = []
    for _ in range(count):
        period = int(torch.randint(8, 21, (1,), generator=source))
        said = torch.randperm(VOCAB, generator=source)[:period]
        rows.append(said.repeat(-(-LENGTH // period))[:LENGTH])
    return torch.stack(rows)


def attention_model(steps: int, rows: int = 48, rate: float = 1e-2) -> tuple[Subject, float]:
    """A two-layer attention-only language model of repeats, and its loss where they repeat for sure, in nats.

    Left alone, all four heads of the second layer become induction heads, and which head a latent belongs to could not
    be told from the tokens. So three of them have no queries and attend evenly: the induction head is head 0.
    """
    source = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = CausalLM(width=64, depth=2, heads=HEADS, mlp="none", tie=False)
        model = Model(decoder=decoder, objective=NextToken(), spec=Repeats().spec)
        model.configure_model()
        with torch.no_grad():
            for parameter in decoder.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(5)  # from a deviation of 0.02, attention takes hundreds of steps to leave its start
            attention: Any = decoder.iter_layers()[1].attention.query
            even = torch.arange(len(attention.bias)) >= len(attention.bias) // HEADS
            for parameter in attention.parameters():
                parameter[even] = 0
                parameter.register_hook(lambda g: g.masked_fill(even.view(-1, *[1] * (g.ndim - 1)), 0))
        moving = torch.optim.AdamW(decoder.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
        for step in range(steps):
            for group in moving.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 20)
            loss = model.objective(model, {"tokens": draw(rows, source)})["next"]
            moving.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            moving.step()
    subject = Subject(decoder.eval(), "repeats")
    held = draw(64, torch.Generator().manual_seed(9))
    logits = subject.logits({"tokens": held})[:, 20:-1]  # behind the longest period
    with torch.no_grad():
        found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), held[:, 21:].flatten())
    return subject, float(found)


def behind_earlier(tokens: Tensor) -> Tensor:
    """[B,T,T] bool: source s is the position behind an earlier occurrence of the token at t."""
    same = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)
    return torch.nn.functional.pad(same, (1, 0))[..., :-1]


@dataclass
class Hits:
    """What the check finds.

    Attributes:
        hit: Share of tokens whose largest source through the head is behind an earlier occurrence of the token.
        share: Mean share of the induction head in the chosen latents.
        attention: Mean attention of that head to such positions, at tokens that have one.
        head: Its number.
    """

    hit: float
    share: float
    attention: float
    head: int


@torch.no_grad()
def source_hits(
    model: Model, data: Activations, latents: int, tops: int, shuffle: torch.Generator | None = None
) -> Hits:
    """Do the latents that belong most to the induction head fire because of where it looks?

    Looked at are their strongest tokens that have occurred before, and the largest source through the head.

    Args:
        model: A dictionary of the second layer's z.
        data: Whole validation samples of repeats.
        latents: How many latents are chosen, of those that fire on ``tops`` such tokens at least.
        tops: Strongest tokens of each.
        shuffle: The control: look through a head drawn anew for each token, as if the labels were shuffled.
    """
    batch = next(iter(data.val_dataloader()))
    wanted = behind_earlier(batch["tokens"])
    old = wanted.any(2)
    codes = model.encoder(batch).dense() * old[..., None]
    looked = (batch["pattern"] * wanted[:, None]).sum((0, 2, 3)) / old.sum()
    head = int(looked.argmax())
    shares = head_shares(model.decoder.W_dec, HEADS)
    usable = (codes > 0).sum((0, 1)) >= tops
    chosen = shares[:, head].masked_fill(~usable, -1).topk(min(latents, int(usable.sum()) or 1)).indices
    flat = codes[..., chosen].flatten(0, 1).topk(tops, 0).indices.T.flatten()  # [latents*tops]
    at = Firings(flat // LENGTH, flat % LENGTH, chosen.repeat_interleave(tops))
    line = linear(model.encoder, batch["activation"], at)
    through = torch.full((len(at),), head)
    if shuffle is not None:
        through = torch.randint(HEADS, (len(at),), generator=shuffle)
    terms = entries(batch["pattern"], batch["value"], line.directions, at)  # [M,H,S]
    source = terms[torch.arange(len(at)), through].argmax(1)
    hit = wanted[at.rows, at.places, source].float().mean()
    return Hits(float(hit), float(shares[chosen, head].mean()), float(looked[head]), head)
