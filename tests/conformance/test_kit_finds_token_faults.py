"""Every check of the kit for token encoders and maskings fails on one that breaks it, and no other check does.

Where one fault necessarily breaks several promises, all their checks are named.
"""

from __future__ import annotations

import pytest
from tests.conformance.healthy import token_plugin
from tests.conformance.planted import broken, finds

TAKE = "            tokens = tokens.take(indices(keep, tokens.values.shape[1]))"
JOINED = "        x = tokens.joined()"

SEEN = """\
            tokens = tokens.with_values(tokens.values + tokens.values.mean(1, keepdim=True))
"""
FORWARD = """\
    def forward(self, batch, keep=None, context=None):
        tokens = self.embed(batch)
        scale = 1 if keep is None else 1.01
        return self.encode(tokens.with_values(tokens.values * scale), keep, context)

    def features("""
DETACHED = f"""\
{TAKE}
            first, rest = tokens.values[:, :1].detach(), tokens.values[:, 1:]
            tokens = tokens.with_values(torch.cat([first, rest], 1))"""

# what is broken: (checks that fail, words of the fault, edits of the healthy plugin)
BROKEN = {
    "prefix tokens that are not counted": (
        "token_layout",
        "prefix_tokens=0",
        [("prefix_tokens = 1", "prefix_tokens = 0")],
    ),
    "cells in columns": (
        "token_layout token_grid token_positions",
        "changes token",
        [(".flatten(3).flatten(1, 2)", ".flatten(3).transpose(1, 2).flatten(1, 2)")],
    ),
    "dropped tokens that are seen": (
        "token_leak token_keep_all token_context token_gradients",
        "leaks",
        [(TAKE, SEEN + TAKE)],
    ),
    "another embedding of kept tokens": (
        "token_keep_all",
        "forward with keep differs",
        [("    def features(", FORWARD)],
    ),
    "kept tokens always sorted": (
        "token_order",
        "permuting keep",
        [(TAKE, TAKE.replace("shape[1])", "shape[1]).sort(1).values"))],
    ),
    "a context that is not kept to": (
        "token_context",
        "masked columns",
        [("scatter(1, chosen, True)", "scatter(1, chosen, True).logical_or(seen)")],
    ),
    "hidden positions": ("token_positions", "positions none, but", [(' * (self.positions != "none")', "")]),
    "positions that are not there": (
        "token_positions",
        "by only",
        [('positions = "none"', 'positions = "learned"'), (' * (self.positions != "none")', " * 0")],
    ),
    "padding that is seen": (
        "token_padding token_context",
        "what padding holds",
        [("        seen = tokens.mask\n", "        seen = torch.ones_like(tokens.mask)\n")],
    ),
    "one grid only": ("token_grid", "2 x 3 cells", [("rows, cells = layout.grid", "rows, cells = 2, 4")]),
    "a kept token without a gradient": ("token_gradients", "no gradient reaches some", [(TAKE, DETACHED)]),
    "features of another layer": ("token_features", "layer 0", [("return tokens if layer == 0 else", "return")]),
    "tokens that depend on their batch": (
        "token_alone token_context",
        "encoded alone",
        [(JOINED, f"{JOINED} - 0.1 * tokens.joined().mean(0, keepdim=True)")],
    ),
    "another answer in bfloat16": (
        "token_bf16",
        "bfloat16",
        [(JOINED, f'{JOINED} * (-1 if torch.is_autocast_enabled("cpu") else 1)')],
    ),
    "a mask of global randomness": (
        "masking_draws",
        "same generator",
        [("layout.cells, generator=generator)", "layout.cells)")],
    ),
}


def test_a_healthy_plugin_has_no_fault(tmp_path, monkeypatch):
    finds(tmp_path, monkeypatch, token_plugin(), "", "", "component")


@pytest.mark.parametrize("what", BROKEN)
def test_it_finds(tmp_path, monkeypatch, what):
    checks, words, edits = BROKEN[what]
    finds(tmp_path, monkeypatch, broken(token_plugin(), *edits), checks, words, "component")
