"""Small texts, encoders and models that the tests share."""

from __future__ import annotations

import torch

from quire import Model
from quire_dupmae.decoder import DuplexDecoder
from quire_dupmae.encoder import RetrievalEncoder
from quire_dupmae.objective import SMALL, DuplexAutoencoding

SPEC = {"vocab_size": 50, "length": 16, "pad": 0, "bos": 2, "eos": 3, "mask_id": 4, "tokenizer": "made-up"}


def texts(rows: int = 3, length: int = 12, seed: int = 0, lengths: list[int] | None = None) -> dict:
    """A batch of random texts with start, end and padding; every token is a word."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 50, (rows, length), generator=generator)
    mask = torch.arange(length) < torch.tensor(lengths or [length] * rows)[:, None]
    tokens[:, 0] = 2
    for row, own in enumerate(mask.sum(1).tolist()):
        tokens[row, own - 1] = 3
    tokens[~mask] = 0
    special = ~mask | (tokens == 2) | (tokens == 3)
    words = torch.arange(length).expand(rows, -1).masked_fill(special, -1)
    return {"tokens": tokens, "mask": mask, "special": special, "word_ids": words}


def encoder(positions: str = "learned", dense_dim: int | None = None, **config) -> RetrievalEncoder:
    """A BERT of one layer and width 32."""
    return RetrievalEncoder({**SMALL, **config}, dense_dim=dense_dim, positions=positions)


def model(objective=None, decoder=None, **more) -> Model:
    """A built pretraining model."""
    parts = {"encoder": encoder(), "decoder": decoder or DuplexDecoder(dropout=0.0)}
    parts["objective"] = objective or DuplexAutoencoding(pictures=0)
    made = Model(**{**parts, **more}, spec=SPEC)
    made.configure_model()
    return made
