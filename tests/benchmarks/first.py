"""Layers skipped by routers: tokens per CPU-second of a routed model beside the whole one, router time inside."""

from __future__ import annotations

import copy
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from tests.benchmarks.clock import one_thread, race, ratio, table

PROMPT, NEW, VOCAB, DEPTH, SKIPS = 64, 64, 8192, 8, (3, 5)
CAUSAL = {"width": 384, "depth": DEPTH, "heads": 6}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 384,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "intermediate_size": 1024,
    "vocab_size": VOCAB,
    "eos_token_id": None,
    "bos_token_id": 1,
    "pad_token_id": 0,
}


def models() -> dict[str, Any]:
    """Two bases, random and built; routers that always skip the same quarter of the layers."""
    from quire.contracts import Spec, build
    from quire.roles.language.hf import HFCausal
    from quire.roles.language.models import CausalLM
    from quire_first.model import RoutedModel

    made = {}
    for name, base in (("CausalLM", CausalLM(**CAUSAL)), ("HFCausal llama", HFCausal(config=LLAMA))):
        torch.manual_seed(0)
        model = RoutedModel(base)
        build(model, Spec({"vocab_size": VOCAB, "length": PROMPT + NEW, "bos": 1}))
        with torch.no_grad():
            for layer, row in model.routers.place.items():
                model.routers.bias[row] = -5.0 if layer in SKIPS else 5.0
        made[name] = model.eval()
    return made


def main() -> None:
    """Print tokens per CPU-second, prompt included, and the ratio to the base."""
    from quire.roles.language.loop import Greedy

    prompt = {"tokens": torch.randint(4, VOCAB, (1, PROMPT), generator=torch.Generator().manual_seed(1))}
    sampler = Greedy(NEW)
    rows = [["base", "arm", "tokens/CPU-s", "against the base", "layers", "cache MB"]]
    with one_thread():
        for name, model in models().items():
            forced = copy.copy(model)
            forced.force = list(SKIPS)
            arms = {"whole": model.base, "routers": model, "the same layers forced": forced}
            runs = {
                arm: (lambda m=m: sampler(SimpleNamespace(decoder=m, encoder=None), prompt)) for arm, m in arms.items()
            }
            found = {arm: run().stats for arm, run in runs.items()}
            spent = race(runs, repeats=7, warmup=1)
            for arm in arms:
                stats = found[arm]
                rows.append(
                    [
                        name,
                        arm,
                        f"{NEW / median(spent[arm]):.1f} ({NEW / min(spent[arm]):.1f})",
                        ratio(spent["whole"], spent[arm]),
                        f"{stats.layers_used_mean or DEPTH:g}",
                        f"{stats.cache_bytes_peak / 1e6:.2f}",
                    ]
                )
    table(f"FiRST (reconstruction): {len(SKIPS)} of {DEPTH} layers skipped, prompt {PROMPT} + {NEW} new, greedy", rows)
