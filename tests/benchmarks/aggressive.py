"""Copying the source on scripted models: tokens a CPU-second beside plain greedy decoding and prompt lookup.

The whole network runs; 1e4 is then added to the logit of the token that a script says, so that the output is the
source with a share of its tokens replaced. An unscripted random model repeats itself, which flatters any copying.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from tests.benchmarks.clock import one_thread, race, table

from quire.contracts import Spec, build
from quire.roles.language.bench_models import Scripted
from quire.roles.language.contract import StepModel
from quire.roles.language.drafters import PromptCopy
from quire.roles.language.hf import HFCausal
from quire.roles.language.loop import Greedy, Speculative
from quire.roles.language.models import CausalLM

VOCAB, LENGTH, PREFILL = 8192, 128, "prefill"
SHAPES = {"llama": {"model_type": "llama", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6,
                    "num_key_value_heads": 6, "intermediate_size": 1024},
          "gpt2": {"model_type": "gpt2", "n_embd": 384, "n_layer": 6, "n_head": 6, "n_positions": 1024}}  # fmt: skip


def edited(source: list[int], share: float, draw: random.Random, kinds: str = "r") -> list[int]:
    """The source with a share of its tokens replaced (r), dropped (d) or doubled by another one (i)."""
    out: list[int] = []
    for token in source:
        kind = draw.choice(kinds) if draw.random() < share else " "
        out += {"r": [draw.randrange(4, VOCAB)], "d": [], "i": [draw.randrange(4, VOCAB), token], " ": [token]}[kind]
    return (out + [draw.randrange(4, VOCAB) for _ in range(LENGTH)])[:LENGTH]


def network(name: str) -> StepModel:
    """One of SHAPES, or Quire's own model of that size, with random weights."""
    torch.manual_seed(0)
    if name == "own":
        made: StepModel = CausalLM(width=384, depth=6, heads=6, norm="rms", mlp="swiglu")
        build(made, Spec({"vocab_size": VOCAB, "length": 1024}))
    else:
        made = HFCausal(config={**SHAPES[name], "vocab_size": VOCAB, "eos_token_id": None, "pad_token_id": 0})
        build(made, Spec())
    return made.eval()


def samplers() -> dict[str, Callable[[], Speculative]]:
    """The arms; each is made anew for each run, so none learns from another."""
    from quire_aggressive.source import SourceCopy

    def speculative(drafter: Any, guard: Any = None) -> Speculative:
        return Speculative(drafter, guard=guard, max_new_tokens=LENGTH)

    return {
        "greedy": lambda: Greedy(LENGTH),
        "prompt copy 3/10": lambda: speculative(PromptCopy(3, 10)),
        "paper's rule": lambda: speculative(SourceCopy(resume=False, adapt=False)),
        "paper's rule, 16": lambda: speculative(SourceCopy(resume=False, adapt=False, max_draft=16)),
        "15": lambda: speculative(SourceCopy(adapt=False, max_draft=15)),
        "SourceCopy": lambda: speculative(SourceCopy()),
    }


def compare(inner: StepModel, share: float, kinds: str, repeats: int) -> list[list[str]]:
    """Rows of arms: passes, tokens a CPU-second, gains over greedy and over prompt copy; the ids are compared."""
    draw = random.Random(1)
    source = [draw.randrange(4, VOCAB) for _ in range(LENGTH)]
    want = edited(source, share, draw, kinds)
    told = Scripted(inner)
    told.follow([source], [want])
    model = SimpleNamespace(decoder=told, encoder=None)
    batch = {"tokens": torch.tensor([source]), "source_span": torch.tensor([[0, LENGTH]])}
    seen: dict[str, Any] = {}

    def arm(name: str, make: Callable[[], Speculative]) -> Callable[[], None]:
        def run() -> None:
            seen[name] = make()(model, batch)

        return run

    arms = {name: arm(name, make) for name, make in samplers().items()}
    spent = race({**arms, PREFILL: arm(PREFILL, lambda: Greedy(1))}, repeats=repeats, warmup=1)
    first = spent.pop(PREFILL)
    decode = {name: [t - median(first) for t in times] for name, times in spent.items()}  # less a bare prompt's prefill
    rows = [["", "passes", "tok/CPU-s", "/ greedy", "/ prompt copy", "with prefill", "", "draft ms a pass", "same ids"]]
    for name, times in decode.items():
        stats = seen[name].stats
        gains = [
            f"{median(t[b]) / median(t[name]):.2f}" for t in (decode, spent) for b in ("greedy", "prompt copy 3/10")
        ]
        rows.append([
            name, str(stats.passes), f"{(LENGTH - 1) / median(times):.0f}", *gains,
            f"{stats.draft_ms / max(1, stats.target_forwards):.2f}", str(seen[name].tokens[0][0] == want),
        ])  # fmt: skip
    return rows


def main(repeats: int = 5, names: tuple[str, ...] = ("llama", "gpt2", "own")) -> None:
    """Print a table for each model and share of edits."""
    from quire.plugins import load

    if "aggressive" not in load().records:
        print("\nAggressive decoding: plugin aggressive is not installed")
        return
    with one_thread(), torch.no_grad():
        for name in names:
            inner = network(name)
            for share, kinds in ((0.0, "r"), (0.1, "r"), (0.3, "r"), (0.1, "rdi")):
                what = "replaced" if kinds == "r" else "replaced, dropped or inserted"
                rows = compare(inner, share, kinds, repeats)
                table(f"Aggressive, {name}: {LENGTH} tokens behind a source of {LENGTH}, {share:.0%} {what}", rows)


if __name__ == "__main__":
    sys.exit(main())
