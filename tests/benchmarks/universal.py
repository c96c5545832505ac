"""One block with a cache: tokens per CPU-second of cached decoding beside running the whole sequence for each token."""

from __future__ import annotations

from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from tests.benchmarks.clock import one_thread, race, ratio, table

PROMPT, NEW, VOCAB, STEPS = 64, 64, 4096, 6


def recomputed(model: Any, prompt: torch.Tensor) -> list[int]:
    """Greedy decoding without a cache."""
    ids = prompt
    with torch.no_grad():
        for _ in range(NEW):
            logits = model(None, ids, torch.ones_like(ids, dtype=torch.bool))
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids[0, prompt.shape[1] :].tolist()


def main() -> None:
    """Print both, for a fixed number of steps and for halting; the ids are compared."""
    from quire.contracts import Spec, build
    from quire.roles.language.loop import Greedy
    from quire_universal.decoder import UniversalDecoder
    from quire_universal.halting import ACT

    prompt = torch.randint(4, VOCAB, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    rows = [["halting", "cached, tokens/CPU-s", "recomputed", "gain", "same ids"]]
    with one_thread():
        for name, halting in (("none", None), ("ACT", ACT(max_steps=STEPS))):
            torch.manual_seed(0)
            model = UniversalDecoder(width=256, heads=8, ffn=1024, steps=STEPS, halting=halting, dropout=0.0)
            build(model, Spec({"vocab_size": VOCAB, "length": PROMPT + NEW, "bos": 1}))
            whole, found = SimpleNamespace(decoder=model.eval(), encoder=None), {}
            batch, sampler = {"tokens": prompt}, Greedy(NEW)
            arms = {
                "cached": lambda w=whole, f=found, b=batch, s=sampler: f.update(cached=s(w, b).tokens[0][0]),
                "recomputed": lambda m=model, f=found: f.update(recomputed=recomputed(m, prompt)),
            }
            spent = race(arms, repeats=5, warmup=1)
            speeds = [f"{NEW / median(spent[a]):.1f} ({NEW / min(spent[a]):.1f})" for a in arms]
            same = str(found["cached"] == found["recomputed"])
            rows.append([name, *speeds, ratio(spent["recomputed"], spent["cached"]), same])
    table(f"Universal Transformer: {STEPS} steps of 256, prompt {PROMPT} + {NEW} new = length {PROMPT + NEW}", rows)
