"""Greedy sentences behind codes: how the autoencoder controls decode a vector. For Celotti et al. 2020's controls."""

from __future__ import annotations

from typing import Any

import torch

from quire.roles.language.contract import StepModel, device_of
from quire.roles.latent.contract import VectorCodes
from quire_ariel.sentence import SentenceCodes


@torch.no_grad()
def speak(model: StepModel, codes: Any, count: int, most: int) -> list[list[int]]:
    """The likeliest token at each step behind each of ``count`` codes, up to an end token or ``most`` tokens."""
    caps, device = model.caps(), device_of(model)
    rows: list[list[int]] = [[] for _ in range(count)]
    alive = torch.arange(count, device=device)
    state = model.open(torch.full((count, 1), int(caps.start_id or 0), device=device), None, codes, max_length=most + 1)
    logits = state.logits
    never = [i for i in {caps.pad_id, caps.start_id} if i not in caps.eos_ids]
    for step in range(most):
        logits[:, never] = -torch.inf
        token = logits.argmax(-1)
        for row, chosen in zip(alive.tolist(), token.tolist()):
            rows[row].append(chosen)
        stay = (~torch.isin(token, torch.tensor(caps.eos_ids, device=device))).nonzero()[:, 0]
        if not len(stay) or step + 1 == most:
            break
        if len(stay) < len(alive):
            model.rows(state, stay)
            alive, token = alive[stay], token[stay]
        logits = model.step(state, token[:, None])[:, 0]
        model.keep(state, torch.zeros(len(alive), 1, dtype=torch.long))
    return rows


def said_again(model: Any, batch: dict[str, Any], most: int) -> list[list[int]]:
    """Each sentence of a batch encoded and decoded: by the cube where there is one, else by an autoencoder."""
    from quire_ariel.decoder import VolumeDecoder
    from quire_ariel.errors import CapacityError

    cube = model.decoder.role(VolumeDecoder)
    if cube is None:
        codes: VectorCodes = model.encoder(batch)
        return speak(model.decoder.role(StepModel), codes, len(codes.vector), most)
    tokens, mask = batch["tokens"], batch.get("mask")
    try:
        return cube.decode(cube.encode(tokens, mask, add_eos=True)).rows()
    except CapacityError:
        if len(tokens) == 1:
            return [[]]  # refused: it is not said again
        parts = [
            {"tokens": tokens[i : i + 1], "mask": None if mask is None else mask[i : i + 1]} for i in range(len(tokens))
        ]
        return [said_again(model, part, most)[0] for part in parts]


def points_like(codes: torch.Tensor, count: int, generator: torch.Generator) -> SentenceCodes:
    """``count`` points, uniform in the axis-aligned box that bounds ``codes`` [N,D]."""
    low, high = codes.amin(0), codes.amax(0)
    return SentenceCodes(low + (high - low) * torch.rand(count, codes.shape[1], generator=generator))
