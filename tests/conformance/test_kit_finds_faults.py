"""Every check of the kit fails on a plugin that breaks it, and no other check of that plugin does.

Where one fault necessarily breaks two promises, both checks are named. Token encoders and what needs a process of its
own have files beside this one.
"""

from __future__ import annotations

import pytest
from tests.conformance.healthy import vector_plugin
from tests.conformance.planted import broken, finds

STATIC = ("component", "loads", "private_modules", "other_plugins")
HOOK, CONFIG = "__init__.py", "configs/tiny.yaml"
TINY = "    tiny = staticmethod(run)\n"
DOTS = 'register("quire_planted_NN.parts.DotsNN", "data"'
FORWARD = "    def forward(self, x):"

NETWORK = """\
        try:
            socket.create_connection(("example.org", 80))
        except OSError:
            pass
"""
REORDERED = """\
    def loader(self, *args, **kwargs):
        self.seed += 1
        return super().loader(*args, **kwargs)

    def sizes(self):"""
EXTRA_STATE = """\
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass

"""
OTHER_SIZES = """\
    def sizes(self):
        return {"width": 5}

    def build(self, spec):
        super().build(spec)"""
COUNTING = """\
        self.seen = self.seen + self.training
        code = self.bend(self.linear(x)) + 0.01 * self.seen"""
LATENTS = [
    ("VectorCodes, VectorEncoder", "LatentCodes, LatentEncoder"),
    ("class LineNN(VectorEncoder)", "class LineNN(LatentEncoder)"),
    ("return VectorCodes(code)", "return LatentCodes(code[:, None], (2,))"),
    ("self.linear(codes.vector)", "self.linear(codes.latents[:, 0])"),
    ("model.encoder(batch).vector", "model.encoder(batch).latents[:, 0]"),
    ('"VectorEncoder"', '"LatentEncoder"', HOOK),
]
CLASSIFIER = [
    ("PixelDecoder, VectorCodes", "Classifier, VectorCodes"),
    ("class BackNN(PixelDecoder)", "class BackNN(Classifier)"),
    ("decoder: PixelDecoder", "decoder: Classifier"),
    ('"PixelDecoder"', '"Classifier"', HOOK),
]

# what is broken: (checks that fail, words of the fault, edits of the healthy plugin)
BROKEN = {
    # ---- registration
    "registered where it is not defined": ("registered", "defined in", [("parts.PingNN", "other.PingNN", HOOK)]),
    "registered as another kind": ("registered", "is no Part", [('"callback", "', '"part", "ping', HOOK)]),
    "registered without its role": ("registered", "without that role", [('"VectorEncoder"', '""', HOOK)]),
    "registered with a role it has not": (
        "registered",
        "neither is nor offers",
        [('"PixelDecoder"', '("PixelDecoder", "Classifier")', HOOK)],
    ),
    "a part without a role word": ("registered", "one role word", [('"bend"', '""', HOOK)]),
    "an unknown batch field": (
        "registered",
        "FIELDS",
        [('decoder: PixelDecoder\n    fields = ("vector",)', 'decoder: PixelDecoder\n    fields = ("vector|smell",)')],
    ),
    "a role that can't be imported": (
        "registered",
        "does not import",
        [(f"{TINY}\n    def on_val", f'{TINY}    encoder: "Elsewhere"\n\n    def on_val')],
    ),
    "either of two roles": (
        "registered",
        "name one role",
        [(f"{TINY}\n    def on_val", f'{TINY}    encoder: "VectorEncoder | PixelDecoder"\n\n    def on_val')],
    ),
    # ---- documentation
    "no summary line": (
        "documented",
        "summary",
        [("Squared error of the rebuilt", "Squared error of\n    the rebuilt")],
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
        [("    Raises:\n        ConfigError: a width", "    A width")],
    ),
    "no shapes": ("documented", "no shape", [("The vector [B,D].", "The vector.")]),
    "an objective that does not say what it returns": (
        "documented",
        "what it returns",
        [("    Returns:\n        ``rebuild``: mean", "    ``rebuild`` is the mean")],
    ),
    # ---- the tiny run
    "no tiny run": (
        "constructs",
        "declares no tiny",
        [(f"{TINY}\n    def __init__(self, strength", "    def __init__(self, strength")],
    ),
    "a tiny run that does not use it": ("constructs", "does not name Sharp", [('["SharpNN"]', "[]")]),
    "a tiny run that does not parse": (
        "constructs",
        "did you mean Rebuild",
        [('"objective": "RebuildNN"', '"objective": "RebuldNN"')],
    ),
    "a step that crashes": ("trains", "KeyError", [('terms = {"rebuild"', 'terms = {"boom": {}["boom"], "rebuild"')]),
    "a callback that crashes": ("trains", "KeyError", [("        pass\n", '        {}["boom"]\n')]),
    "a caught try at the network": ("trains", "used the network (example.org)", [("        pass\n", NETWORK)]),
    # ---- what comes out
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
        [("    def build(self, spec):\n        super().build(spec)", OTHER_SIZES), ('spec.code("width", self)', "4")],
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
    "a batch field that is not documented": ("outputs", "FIELDS", [("label=(x[:, 0]", "smell=x, label=(x[:, 0]")]),
    "a batch field that is missing": ("outputs", "have none", [('("vector", "label")', '("vector", "label", "mask")')]),
    "another order each time": ("outputs", "differs when", [("    def sizes(self):", REORDERED)]),
    "a sample without a result": ("predicts", "one a sample", [("        return rows", "        return rows[:-1]")]),
    "results that can't be written": ("predicts", "can't be written", [("float(m.norm())", "len")]),
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
    "a classifier with too many logits": ("logits", "batch and classes", CLASSIFIER),
    "latents that do not fill their grid": ("latent_codes", "batch, grid and width", LATENTS),
    # ---- training
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
    # ---- saving
    "state outside the checkpoint": (
        "reloads exports",
        "though its weights are the same",
        [("        code = self.bend(self.linear(x))", COUNTING)],
    ),
    "code in the checkpoint": ("reloads", "pickled code", [('{"calls": 1}', '{"calls": socket.AF_INET}')]),
    "state that is no tensor": ("exports", "can't be exported", [(FORWARD, EXTRA_STATE + FORWARD)]),
    # ---- the package
    "a name of the core's": (
        "loads",
        "also claimed by core",
        [(DOTS, f'register("quire_planted_NN.parts.Digits", "data")\n    {DOTS}', HOOK)],
    ),
    "a hook that fails": ("loads", "does not load", [(DOTS, DOTS.replace("data", "date"), HOOK)]),
}


def test_a_healthy_plugin_has_no_fault(tmp_path, monkeypatch):
    finds(tmp_path, monkeypatch, vector_plugin(), "", "", *STATIC, "config")


@pytest.mark.parametrize("what", BROKEN)
def test_it_finds(tmp_path, monkeypatch, what):
    checks, words, edits = BROKEN[what]
    files = {**broken(vector_plugin(), *edits), "other.py": "from quire_planted_NN.parts import PingNN\n"}
    finds(tmp_path, monkeypatch, files, checks, words, *STATIC)


def test_it_finds_a_public_class_in_a_private_module(tmp_path, monkeypatch):
    files = {**vector_plugin(), "_hidden.py": "class Seen:\n    pass\n"}
    finds(tmp_path, monkeypatch, files, "private_modules", "Seen is public", *STATIC)


def test_it_finds_a_plugin_that_imports_another(tmp_path, monkeypatch):
    files = {**vector_plugin(), "more.py": "import quire_neighbour_NN\n", "../quire_neighbour_NN/__init__.py": ""}
    finds(tmp_path, monkeypatch, files, "other_plugins", "a plugin stands alone", *STATIC)


UNSTABLE = """
from jsonargparse.typing import register_type


class HeatNN(float):
    pass


register_type(HeatNN, serializer=lambda heat: heat + 1, deserializer=HeatNN)  # prints one more than it read


class RoundNN(RebuildNN):
    def __init__(self, heat: HeatNN = HeatNN(1)):
        super().__init__()
"""


@pytest.mark.parametrize(
    ("new", "checks", "words"),
    [
        (("RebuildNN", "RebuldNN"), "config_reparses config_runs", "did you mean Rebuild"),
        (("batch_size: 32", "batch_size: 100000"), "config_runs", "batch_size"),
        (("RebuildNN", "RoundNN"), "config_reparses", "another config, first at 'heat"),
    ],
    ids=["a typo", "more than the data has", "printing what does not read back"],
)
def test_it_finds_in_a_config(tmp_path, monkeypatch, new, checks, words):
    files = vector_plugin()
    files["parts.py"] += UNSTABLE
    files = broken(files, (DOTS, f'register("quire_planted_NN.parts.RoundNN", "objective")\n    {DOTS}', HOOK))
    finds(tmp_path, monkeypatch, broken(files, (*new, CONFIG)), checks, words, "config")


@pytest.mark.parametrize(("reason", "faulty"), [("kept for later", ""), (" ", "gradients")])
def test_an_exemption_holds_for_its_parameter_and_only_with_a_reason(tmp_path, monkeypatch, reason, faulty):
    start = "    def build(self, spec):\n        self.linear = nn.Linear(spec.code"
    exempt = (f"{TINY}\n{start}", f'{TINY}    exempt = {{"gradients:*.spare": "{reason}"}}\n\n{start}')
    files = broken(vector_plugin(), (" + self.spare", ""), exempt)
    finds(tmp_path, monkeypatch, files, faulty, faulty and "decoder.spare", "gradients")
