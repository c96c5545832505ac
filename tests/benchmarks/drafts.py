"""What drafters guess right of text that no model wrote: accepted tokens a step, and the time of drafting.

A small model's own continuations repeat themselves, which flatters every drafter that copies. Here the next token is
always the held-out document's, so no pass of a model is needed: a step takes the longest path of the draft that the
text follows, and one token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from tests.benchmarks.clock import table

from quire.datasets.text import standard_library
from quire.roles.language.accept import walk
from quire.roles.language.contract import Caps, Draft, Drafter
from quire.roles.language.drafters import DraftUnion, PromptCopy
from quire.roles.language.text import BPE

PROMPT, COUNT, EACH, EARLY, NODES = 48, 128, 60, 10, 16


def accepted(drafter: Drafter, texts: list[list[int]], vocab: int) -> tuple[list[float], float]:
    """Accepted tokens a step of each text, and milliseconds of drafting a step."""
    model: Any = SimpleNamespace(caps=lambda: Caps(vocab))
    found, spent, steps = [], 0.0, 0
    for text in texts:
        drafter.begin(model, [text[:PROMPT]], None)
        at, taken, own = PROMPT + 1, 0, 0
        while at < len(text):
            start = time.process_time()
            draft = drafter.propose(0, text[:at], NODES) or Draft([], [])
            spent += time.process_time() - start
            draft = draft.cut(len(text) - at - 1, NODES)
            says = [text[at + depth] for depth in (0, *draft.depths())]
            nodes, bonus = walk(draft, says.__getitem__)
            path = [draft.tokens[n] for n in nodes]
            drafter.observe(0, text[:at], [*path, bonus], [t for t in draft.tokens if t not in path])
            taken, own, at = taken + len(path), own + 1, at + len(path) + 1
        found.append(taken / own)
        steps += own
    return found, 1e3 * spent / steps


def drafters(documents: list[list[int]], tokenizer: Any) -> dict[str, Callable[[], Drafter]]:
    """The arms, each made anew for a domain."""
    from quire_aded.drafter import TrigramTree

    def tree(**how: Any) -> Drafter:
        made = TrigramTree(corpus=None, nodes=NODES, scope="shared", **how)
        made.learn(documents, tokenizer.vocab_size)
        return made

    return {
        "prompt lookup 3/10": PromptCopy,
        "trigram tree, static": lambda: tree(delta=0.0),
        "trigram tree, adaptive (ADED)": tree,
        "lookup and ADED joined": lambda: DraftUnion([PromptCopy(3, 4), tree()]),
    }


def main() -> None:
    """Print a table of each domain, prompts in order: what is learnt from the first helps the later ones."""
    from quire.plugins import load

    if "aded" not in load().records:
        print("\nDrafts: plugin aded is not installed")
        return
    domains = {name: standard_library(f"stdlib:{name}") for name in ("code", "docs")}
    train = [t for texts in domains.values() for i, t in enumerate(texts) if i % 10 != 9]
    tokenizer = BPE(4096)
    tokenizer.fit(train)
    documents = [tokenizer.encode(t) for t in train]
    for name, texts in domains.items():
        stream = [i for t in texts[9::10] for i in tokenizer.encode(t)]
        gap = (len(stream) - PROMPT - COUNT) // EACH
        rows = [stream[i * gap : i * gap + PROMPT + COUNT] for i in range(EACH)]
        lines = [["", f"accepted a step, first {EARLY}", "later", "draft ms a step"]]
        for arm, make in drafters(documents, tokenizer).items():
            found, spent = accepted(make(), rows, tokenizer.vocab_size)
            early, late = sum(found[:EARLY]) / EARLY, sum(found[EARLY:]) / (EACH - EARLY)
            lines.append([arm, f"{early:.2f}", f"{late:.2f}", f"{spent:.2f}"])
        table(f"Drafts of held-out {name}, {EACH} stretches of {COUNT} tokens behind {PROMPT}, {NODES} nodes", lines)
