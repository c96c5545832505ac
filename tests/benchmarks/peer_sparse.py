"""Other projects' TopK dictionaries, each by its own training step on the same shape; each in its own environment."""

from __future__ import annotations

import contextlib
import os
import sys
import types
from collections.abc import Callable

import torch
from tests.benchmarks.sparse_speed import KEPT, LATENTS, RATE, TOKENS, WIDTH, batches
from tests.benchmarks.turns import serve


def sparsify() -> Callable[[], float]:
    """sparsify's coder and decoder, in the step that its trainer makes: loss, projection, Adam, unit rows."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernels need a GPU; without them it uses embedding_bag
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(WIDTH, SparseCoderConfig(num_latents=LATENTS, k=KEPT))
    optimizer = torch.optim.Adam(coder.parameters(), lr=RATE, fused=True)
    following = batches()

    def step() -> float:
        optimizer.zero_grad()
        loss = coder(following()).fvu
        loss.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        coder.set_decoder_norm_to_unit_norm()
        return loss.item()

    return step


def dictionary_learning() -> Callable[[], float]:
    """``TopKTrainer.update``."""
    stub = types.ModuleType("nnsight")  # its package imports nnsight, which training on given rows never uses
    stub.LanguageModel = object  # type: ignore[attr-defined]
    sys.modules["nnsight"] = stub
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=10_000, activation_dim=WIDTH, dict_size=LATENTS, k=KEPT, layer=0, lm_name="none", lr=RATE, device="cpu"
    )
    following, place = batches(), [0]

    def step() -> float:
        place[0] += 1
        return trainer.update(place[0], following())

    return step


def sae_lens() -> Callable[[], float]:
    """``SAETrainer.step`` on a TopKTrainingSAE."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=WIDTH, d_sae=LATENTS, k=KEPT))
    cfg = SAETrainerConfig(
        total_training_samples=10_000 * TOKENS, train_batch_size_samples=TOKENS, lr=RATE, lr_end=RATE
    )
    following = batches()
    trainer = SAETrainer(cfg, sae, iter(following, None))  # type: ignore[arg-type]

    def step() -> float:
        trainer.n_training_steps += 1
        return float(trainer.step(following()).loss)

    return step


PEERS = {"sparsify": sparsify, "dictionary_learning": dictionary_learning, "sae_lens": sae_lens}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(sys.stderr):  # what they print must not stand between answers
        made = PEERS[sys.argv[1]]()
    serve(made)
