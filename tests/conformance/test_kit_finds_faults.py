"""Every check of the kit fails on a component that breaks it, and no other check of the same plugin does.

Where one fault necessarily breaks two promises, both are named.
"""

from __future__ import annotations

import pytest

from quire.testing import faults
from tests.conformance.planted import broken, planted, token_plugin, vector_plugin

STATIC = ("component", "loads", "private_modules", "other_plugins")
HOOK = "__init__.py"
CONFIG = "configs/tiny.yaml"
RUN = "    tiny = staticmethod(run)\n"

# name: (checks that fail, words of the fault, edits of the healthy plugin)
VECTORS = {
    "registered where it is not defined": (
        "registered",
        "defined in",
        [('parts.PingNN"', 'other.PingNN"', HOOK)],
    ),
    "registered as another kind": (
        "registered",
        "is no Part",
        [('parts.PingNN", "callback", "', 'parts.PingNN", "part", "ping', HOOK)],
    ),
    "registered without its role": (
        "registered",
        "without that role",
        [('"encoder", "VectorEncoder"', '"encoder", ""', HOOK)],
    ),
    "registered with a role it has not": (
        "registered",
        "neither is nor offers",
        [('"decoder", "PixelDecoder"', '"decoder", ("PixelDecoder", "Classifier")', HOOK)],
    ),
    "a part without a role word": ("registered", "one role word", [('"part", "bend"', '"part", ""', HOOK)]),
    "an unknown batch field": (
        "registered",
        "FIELDS",
        [
            (
                '"""\n\n    decoder: PixelDecoder\n    fields = ("vector",)',
                '"""\n\n    decoder: PixelDecoder\n    fields = ("vector|smell",)',
            )
        ],
    ),
    "a role that can't be imported": (
        "registered",
        "does not import",
        [
            ("class SharpNN(Metric):\n", "class SharpNN(Metric):\n"),
            (
                "    tiny = staticmethod(run)\n\n    def on_validation_end",
                '    tiny = staticmethod(run)\n    encoder: "Elsewhere"\n\n    def on_validation_end',
            ),
        ],
    ),
    "no summary line": (
        "documented",
        "summary",
        [
            (
                '"""Squared error of the rebuilt data. Doe et al. 2024.\n',
                '"""Squared error of the\n    rebuilt data. Doe et al. 2024.\n',
            )
        ],
    ),
    "no source": (
        "documented",
        "no source",
        [('"""Components. Doe et al. 2024."""', '"""Components."""'), ("on time. Doe et al. 2024.", "on time.")],
    ),
    "an argument not explained": ("documented", "argument out", [("        out: Width of the code.\n", "")]),
    "an error not announced": (
        "documented",
        "ConfigError",
        [("    Raises:\n        ConfigError: a width below 1.\n", "")],
    ),
    "no shapes": ("documented", "no shape", [("        The vector [B,D].", "        The vector.")]),
    "an objective that does not say what it returns": (
        "documented",
        "what it returns",
        [("    Returns:\n        ``rebuild``: mean over the batch.\n", "")],
    ),
    "no tiny run": (
        "constructs",
        "declares no tiny",
        [(RUN + "\n    def __init__(self, strength", "    def __init__(self, strength")],
    ),
    "a tiny run that does not use it": (
        "constructs",
        "does not name SharpNN",
        [('"metrics": ["SharpNN"]', '"metrics": []')],
    ),
    "a tiny run that does not parse": (
        "constructs",
        "did you mean RebuildNN",
        [('"objective": "RebuildNN"', '"objective": "RebuldNN"')],
    ),
    "a step that crashes": ("trains", "KeyError", [("        terms = {", "        terms = {'boom': {}['boom'], ")]),
    "a callback that crashes": ("trains", "boom", [("        pass\n", "        {}['boom']\n")]),
    "a caught try at the network": (
        "trains",
        "network",
        [
            (
                "        pass\n",
                '        try:\n            socket.create_connection(("example.org", 80))\n        except OSError:\n            pass\n',
            )
        ],
    ),
    "codes with other rows than the batch": (
        "outputs vector_codes",
        "rows for a batch",
        [
            ("VectorCodes(code)", "VectorCodes(torch.cat([code, code]))"),
            ("self.linear(codes.vector)", "self.linear(codes.vector[: len(codes.vector) // 2])"),
        ],
    ),
    "codes that are not finite": (
        "outputs",
        "not finite",
        [("VectorCodes(code)", "VectorCodes(code if torch.is_grad_enabled() else code / 0)")],
    ),
    "sizes that are not the codes'": (
        "outputs vector_codes",
        "says width 5",
        [
            (
                "    def build(self, spec):\n        super().build(spec)",
                '    def sizes(self):\n        return {"width": 5}\n\n    def build(self, spec):\n        super().build(spec)',
            ),
            ('spec.code("width", self)', "4"),
        ],
    ),
    "a term without a gradient": (
        "outputs",
        "without a gradient",
        [('{"rebuild": error}', '{"rebuild": error, "extra": error.detach()}')],
    ),
    "a metric that is not finite": (
        "outputs",
        "one finite number",
        [("self.total / self.count", 'self.total / self.count * float("nan")')],
    ),
    "a batch field that is not documented": (
        "outputs",
        "FIELDS",
        [("label=(x[:, 0] > 0).long()", "label=(x[:, 0] > 0).long(), smell=x")],
    ),
    "a batch field that is missing": (
        "outputs",
        "have none",
        [('fields = ("vector", "label")', 'fields = ("vector", "label", "mask")')],
    ),
    "another order each time": (
        "outputs",
        "differs when",
        [
            (
                "    def sizes(self):",
                "    def loader(self, *args, **kwargs):\n        self.seed += 1\n        return super().loader(*args, **kwargs)\n\n    def sizes(self):",
            )
        ],
    ),
    "a parameter without a gradient": ("gradients", "no gradient reaches decoder.spare", [(" + self.spare", "")]),
    "a gradient that is not finite": (
        "gradients",
        "decoder.spare is not finite",
        [(" + self.spare", " + torch.nan_to_num(torch.sqrt(self.spare - self.spare.detach()))")],
    ),
    "a loss that rises": (
        "learns",
        "does not fall",
        [('{"rebuild": error}', '{"rebuild": 2 * error.detach() - error}')],
    ),
    "randomness of its own": (
        "repeats",
        "never from numpy",
        [('{"rebuild": error}', '{"rebuild": error * (1 + self.training * random.random())}')],
    ),
    "state outside the checkpoint": (
        "reloads exports",
        "though its weights are the same",
        [
            (
                "        code = self.bend(self.linear(x))",
                "        self.seen = self.seen + self.training\n        code = self.bend(self.linear(x)) + 0.01 * self.seen",
            )
        ],
    ),
    "code in the checkpoint": ("reloads", "pickled code", [('{"calls": 1}', '{"calls": socket.AF_INET}')]),
    "state that is no tensor": (
        "exports",
        "can't be exported",
        [
            (
                "    def forward(self, x):",
                '    def get_extra_state(self):\n        return {"a": 1}\n\n    def set_extra_state(self, state):\n        pass\n\n    def forward(self, x):',
            )
        ],
    ),
    "a sample without a result": ("predicts", "one a sample", [("        return rows", "        return rows[:-1]")]),
    "results that can't be written": ("predicts", "can't be written", [('"norm": float(m.norm())', '"norm": len')]),
    "a vector that depends on its batch": (
        "vector_codes",
        "encoded alone",
        [("VectorCodes(code)", "VectorCodes(code - code.mean(0))")],
    ),
    "an image of another shape": (
        "pixels",
        "decodes to",
        [("self.linear(codes.vector) + self.spare", "(self.linear(codes.vector) + self.spare)[:, None]")],
    ),
    "a classifier with too many logits": (
        "logits",
        "batch and classes",
        [
            ("PixelDecoder, VectorCodes", "Classifier, VectorCodes"),
            ("class BackNN(PixelDecoder)", "class BackNN(Classifier)"),
            ("decoder: PixelDecoder", "decoder: Classifier"),
            ('"PixelDecoder"', '"Classifier"', HOOK),
        ],
    ),
    "latents that do not fill their grid": (
        "latent_codes",
        "batch, grid and width",
        [
            ("VectorCodes, VectorEncoder", "LatentCodes, LatentEncoder"),
            ("class LineNN(VectorEncoder)", "class LineNN(LatentEncoder)"),
            ("return VectorCodes(code)", "return LatentCodes(code[:, None], (2,))"),
            ("self.linear(codes.vector)", "self.linear(codes.latents[:, 0])"),
            ("model.encoder(batch).vector", "model.encoder(batch).latents[:, 0]"),
            ('"VectorEncoder"', '"LatentEncoder"', HOOK),
        ],
    ),
    "a name of the core's": (
        "loads",
        "also claimed by core",
        [
            (
                'register("quire_planted_NN.parts.DotsNN"',
                'register("quire_planted_NN.parts.Digits", "data")\n    register("quire_planted_NN.parts.DotsNN"',
                HOOK,
            )
        ],
    ),
    "a hook that fails": (
        "loads",
        "does not load",
        [
            (
                'register("quire_planted_NN.parts.DotsNN", "data"',
                'register("quire_planted_NN.parts.DotsNN", "date"',
                HOOK,
            )
        ],
    ),
}

TOKENS = {
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
        [
            (
                "            tokens = tokens.take(",
                "            tokens = tokens.with_values(tokens.values + tokens.values.mean(1, keepdim=True)).take(",
            )
        ],
    ),
    "another embedding of kept tokens": (
        "token_keep_all",
        "forward with keep differs",
        [
            (
                "    def features(",
                "    def forward(self, batch, keep=None, context=None):\n        tokens = self.embed(batch)\n        scale = 1 if keep is None else 1.01\n        return self.encode(tokens.with_values(tokens.values * scale), keep, context)\n\n    def features(",
            )
        ],
    ),
    "kept tokens always sorted": (
        "token_order",
        "permuting keep",
        [
            (
                "tokens.take(indices(keep, tokens.values.shape[1]))",
                "tokens.take(indices(keep, tokens.values.shape[1]).sort(1).values)",
            )
        ],
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
    "square grids only": ("token_grid", "2 x 3 cells", [("rows, cells = layout.grid", "rows, cells = 2, 4")]),
    "a kept token without a gradient": (
        "token_gradients",
        "no gradient reaches some",
        [
            (
                "            tokens = tokens.take(indices(keep, tokens.values.shape[1]))",
                "            tokens = tokens.take(indices(keep, tokens.values.shape[1]))\n            v = tokens.values\n            tokens = tokens.with_values(torch.cat([v[:, :1].detach(), v[:, 1:]], 1))",
            )
        ],
    ),
    "features of another layer": ("token_features", "layer 0", [("return tokens if layer == 0 else", "return")]),
    "tokens that depend on their batch": (
        "token_alone token_context",
        "encoded alone",
        [("        x = tokens.joined()", "        x = tokens.joined() - 0.1 * tokens.joined().mean(0, keepdim=True)")],
    ),
    "another answer in bfloat16": (
        "token_bf16",
        "bfloat16",
        [
            (
                "        x = tokens.joined()",
                '        x = tokens.joined() * (-1 if torch.is_autocast_enabled("cpu") else 1)',
            )
        ],
    ),
    "a mask of global randomness": (
        "masking_draws",
        "same generator",
        [("layout.cells, generator=generator)", "layout.cells)")],
    ),
}


def check(tmp_path, monkeypatch, files, wanted, words, *scopes):
    with planted(tmp_path, monkeypatch, files) as name:
        found = faults(name, *scopes)
        words = words.replace("NN", name.partition("-")[2])
    assert {check for check, _ in found} == set(wanted.split()), found
    assert words in " | ".join(found.values())


@pytest.mark.parametrize("files", [vector_plugin(), token_plugin()], ids=["vectors", "tokens"])
def test_a_healthy_plugin_has_no_fault(tmp_path, monkeypatch, files):
    check(tmp_path, monkeypatch, files, "", "", *STATIC, "config")


@pytest.mark.parametrize("name", VECTORS)
def test_it_finds(tmp_path, monkeypatch, name):
    wanted, words, edits = VECTORS[name]
    files = {**broken(vector_plugin(), *edits), "other.py": "from quire_planted_NN.parts import PingNN\n"}
    check(tmp_path, monkeypatch, files, wanted, words, *STATIC)


@pytest.mark.parametrize("name", TOKENS)
def test_it_finds_in_a_token_encoder(tmp_path, monkeypatch, name):
    wanted, words, edits = TOKENS[name]
    check(tmp_path, monkeypatch, broken(token_plugin(), *edits), wanted, words, *STATIC)


def test_it_finds_a_public_class_in_a_private_module(tmp_path, monkeypatch):
    files = {**vector_plugin(), "_hidden.py": "class Seen:\n    pass\n"}
    check(tmp_path, monkeypatch, files, "private_modules", "Seen is public", *STATIC)


def test_it_finds_a_plugin_that_imports_another(tmp_path, monkeypatch):
    files = {**vector_plugin(), "more.py": "import quire_neighbour_NN\n", "../quire_neighbour_NN/__init__.py": ""}
    check(tmp_path, monkeypatch, files, "other_plugins", "a plugin stands alone", *STATIC)


@pytest.mark.parametrize(
    ("old", "new", "wanted", "words"),
    [
        ("objective: RebuildNN", "objective: RebuldNN", "config_reparses config_runs", "did you mean RebuildNN"),
        ("batch_size: 32", "batch_size: 100000", "config_runs", "batch_size"),
        ("objective: RebuildNN", "objective: RoundNN", "config_reparses", "another config"),
    ],
    ids=["typo", "too large", "unstable"],
)
def test_it_finds_in_a_config(tmp_path, monkeypatch, old, new, wanted, words):
    # what it prints is one more than what it read
    unstable = """
from jsonargparse.typing import register_type

class HeatNN(float):
    pass

register_type(HeatNN, serializer=lambda heat: heat + 1, deserializer=HeatNN)

class RoundNN(RebuildNN):
    def __init__(self, heat: HeatNN = HeatNN(1)):
        super().__init__()
"""
    files = {**vector_plugin(), "parts.py": vector_plugin()["parts.py"] + unstable}
    files = broken(
        files,
        (
            'register("quire_planted_NN.parts.DotsNN"',
            'register("quire_planted_NN.parts.RoundNN", "objective")\n    register("quire_planted_NN.parts.DotsNN"',
            HOOK,
        ),
    )
    check(tmp_path, monkeypatch, broken(files, (old, new, CONFIG)), wanted, words, "config")


def test_an_exemption_with_a_reason_is_kept_to_its_parameter(tmp_path, monkeypatch):
    files = broken(vector_plugin(), (" + self.spare", ""))
    excused = broken(
        files,
        ("class BackNN(PixelDecoder):", 'class BackNN(PixelDecoder):\n    exempt = {"gradients:*.spare": "for later"}'),
    )
    excused = broken(
        excused, ('for later"}\n    """A linear map from codes', 'for later"}\n    """A linear map from codes')
    )
    with planted(tmp_path, monkeypatch, excused) as name:
        found = faults(name, "gradients")
    assert found == {}
