"""Every check of the kit for step models, drafters and acceptance rules fails on one that breaks it.

Where one fault necessarily breaks several promises, all their checks are named.
"""

from __future__ import annotations

import pytest
from tests.conformance.healthy_language import language_plugin
from tests.conformance.planted import broken, finds

from quire.testing.language import PARTS, STEP_MODEL

SCOPES = [run.__name__ for runs in (STEP_MODEL, *PARTS.values()) for run in runs]

READ = "line.append(self.read(torch.cat([state.cache[b], x[b, path]])))"
ROWS = "        state.cache = [state.cache[i] for i in order.tolist()]\n"
TAIL = "        tail = context[-2:]\n"
FOUND = "            if not found:\n                return nodes, token\n"
NEW = '        state.extras["new"] = x\n'
STAYS = """\
        if valid is not None:
            state.cache = [torch.cat([held, new[~ok]]) for held, new, ok in zip(state.cache, x, valid)]
"""

# what is broken: (checks that fail, words of the fault, edits of the healthy plugin)
BROKEN = {
    "a vocabulary that is not the logits'": (
        "step_caps drafter_lossless",
        "batch and caps say",
        [("nn.Linear(32, vocab)", "nn.Linear(32, vocab + 2)")],
    ),
    "lengths that are not counted on": (
        "step_caps step_drafted step_lossless drafter_lossless",
        "lengths are",
        [("torch.tensor([len(x) for x in state.cache])", "state.lengths")],
    ),
    "a position off by one": (
        "step_positions step_keep step_tree step_valid step_lossless",
        "look at positions",
        [
            ("def read(self, x):", "def read(self, x, kept=None):"),
            ("places = torch.arange(len(x))", "places = torch.arange(len(x)); places[kept:] += kept is not None"),
            (READ, READ.replace("path]])))", "path]]), len(state.cache[b])))")),
        ],
    ),
    "a kept path in another order": (
        "step_positions step_keep step_valid step_drafted step_lossless",
        "fresh open",
        [("kept = [slot for slot in row if slot >= 0]", "kept = [slot for slot in row if slot >= 0][::-1]")],
    ),
    "a sibling that is seen": (
        "step_tree step_lossless drafter_lossless",
        "its ancestors",
        [("at - 1 if parents is None else int(parents[b, at])", "at - 1")],
    ),
    "a stale cache row": (
        "step_rows step_lossless drafter_lossless",
        "stale cache row",
        [(ROWS, "        state.cache = state.cache[: len(order)]\n")],
    ),
    "logits that stay behind": (
        "step_rows",
        "state's logits behind",
        [("        state.logits = state.logits[order]\n", "        state.logits = state.logits[: len(order)]\n")],
    ),
    "padding that is read": (
        "step_alone",
        "padded on the left",
        [("held = [self.token(ids[m]) for ids, m", "held = [self.token(ids[: int(m.sum())]) for ids, m")],
    ),
    "rows that see their batch": (
        "step_alone",
        "the same prompt alone",
        [
            (
                "logits = torch.stack([self.read(x) for x in held])",
                "logits = torch.stack([self.read(x) for x in held])\n        logits = (logits + logits.mean(0)) / 2",
            )
        ],
    ),
    "a slot that stays though it is not valid": ("step_valid step_lossless", "not valid", [(NEW, NEW + STAYS)]),
    "guesses of the prefill that stay": (
        "step_drafted step_lossless drafter_lossless",
        "open_drafted",
        [("[x[:n] for x, n in zip", "[x for x, n in zip")],
    ),
    "embeddings on another scale": (
        "step_embeds",
        "differs from step with ids",
        [("return self.token(ids)\n\n    def read", "return 4 * self.token(ids)\n\n    def read")],
    ),
    "a drafter that pops the context": (
        "drafter_context drafter_lossless",
        "changes the context",
        [(TAIL, "        tail = [context.pop(), context[-1]]\n")],
    ),
    "a drafter that extends the prompts": (
        "drafter_context drafter_lossless",
        "begin changes the prompts",
        [("self.first = [p[0] for p in prompts]", "[p.append(p[0]) for p in prompts]")],
    ),
    "a drafter that eats what it observes": (
        "drafter_context",
        "observe changes",
        [("accepted, rejected):\n        pass", "accepted, rejected):\n        accepted.clear()")],
    ),
    "a draft over the budget": ("drafter_context", "with a budget of 1", [("tail[:budget]", "tail")]),
    "a child before its parent": (
        "drafter_context drafter_lossless",
        "before its child",
        [("[-1] * len(tokens)", "[len(tokens)] * len(tokens)")],
    ),
    "unknown ids": (
        "drafter_context drafter_lossless",
        "outside the vocabulary",
        [("tokens = tail[:budget]", "tokens = [100000]")],
    ),
    "a path that is none": (
        "acceptance_paths acceptance_law",
        "not a path",
        [(FOUND, FOUND.replace("nodes, token", "nodes[::-1], token"))],
    ),
    "a sample that is thrown away": (
        "acceptance_law",
        "declares lossless=True",
        [(FOUND, FOUND.replace("nodes, token", "nodes, self.first(logits[at + 1], generator)"))],
    ),
    "a greedy rule that takes the second": (
        "acceptance_law",
        "take one sample a node",
        [
            (
                "return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))",
                "return int(logits.argmax())",
            ),
            (FOUND, FOUND.replace("nodes, token", "nodes, int(logits[at + 1].topk(2).indices[1])")),
        ],
    ),
}


def test_a_healthy_plugin_has_no_fault(tmp_path, monkeypatch):
    finds(tmp_path, monkeypatch, language_plugin(), "", "", *SCOPES)


@pytest.mark.parametrize("what", BROKEN)
def test_it_finds(tmp_path, monkeypatch, what):
    checks, words, edits = BROKEN[what]
    finds(tmp_path, monkeypatch, broken(language_plugin(), *edits), checks, words, *SCOPES)


def test_every_check_is_failed_by_some_fault():
    assert {name for checks, *_ in BROKEN.values() for name in checks.split()} == set(SCOPES)
