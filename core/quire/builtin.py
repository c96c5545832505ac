"""Quire's own components, registered as any plugin registers its own."""

from __future__ import annotations

from collections.abc import Callable

from quire.hooks import hookimpl

TABLE: dict[str, list[tuple[str, str, tuple[str, ...]]]] = {
    "quire.model": [("Sum", "objective", ())],
    "quire.checkpoint": [("Pretrained", "part", ("pretrained",))],
    "quire.schedule": [("WarmupCosine", "part", ("schedule",)), ("Constant", "part", ("schedule",))],
    "quire.datasets.images": [
        ("Digits", "data", ()),
        ("TorchvisionImages", "data", ()),
        ("ImageFolder", "data", ()),
        ("NpzImages", "data", ()),
        ("SampleImages", "data", ()),
    ],
    "quire.datasets.speech": [("SpeechFolder", "data", ()), ("SpeechTones", "data", ())],
    "quire.roles.tokens.vit": [("ViTEncoder", "encoder", ("TokenEncoder",))],
    "quire.roles.tokens.timm": [("TimmViT", "encoder", ("TokenEncoder",))],
    "quire.roles.tokens.frames": [("FrameEncoder", "encoder", ("TokenEncoder",))],
    "quire.roles.tokens.text": [("TextEncoder", "encoder", ("TokenEncoder",))],
    "quire.roles.tokens.reconstruct": [
        ("GridDecoder", "decoder", ()),
        ("MaskedReconstruction", "objective", ()),
        ("PatchPixels", "part", ("target",)),
    ],
    "quire.roles.masking": [
        (name, "part", ("masking",)) for name in ("RandomMask", "BlockMask", "SpanMask", "GridMask", "ContextSubset")
    ],
    "quire.roles.probes": [
        ("Classify", "objective", ()),
        ("KNNProbe", "callback", ()),
        ("LinearProbe", "callback", ()),
        ("AttentiveProbe", "callback", ()),
        ("Health", "callback", ()),
    ],
    "quire.roles.latent": [
        ("ConvVectorEncoder", "encoder", ("VectorEncoder",)),
        ("MlpVectorEncoder", "encoder", ("VectorEncoder",)),
        ("FlatPixels", "encoder", ("VectorEncoder",)),
        ("PCAEncoder", "encoder", ("VectorEncoder",)),
        ("Pooled", "encoder", ("VectorEncoder",)),
        ("ConvVectorDecoder", "decoder", ("PixelDecoder",)),
        ("MlpVectorDecoder", "decoder", ("PixelDecoder",)),
    ],
}


@hookimpl
def quire_components(register: Callable) -> None:
    """Core's components."""
    for module, rows in TABLE.items():
        for name, kind, role in rows:
            register(f"{module}.{name}", kind, role)


@hookimpl
def quire_commands(register: Callable) -> None:
    """Core's commands, beside Lightning's fit, validate, test and predict."""
    register("plugins", "quire.commands.plugins", "installed plugins, broken ones with their error")
    register("components", "quire.commands.components", "every component: name, kind, roles, plugin")
    register("configs", "quire.commands.configs", "YAML files that plugins ship, for -c plugin/name")
    register("doctor", "quire.commands.doctor", "check versions, plugins and the machine")
    register("matrix", "quire.commands.matrix", "which parts fit which")
    register("new", "quire.commands.new", "start a plugin of your own")
    register("reproduce", "quire.reproduce.main", "run a plugin's claim against its controls")
    register("probe", "quire.roles.probes.main", "judge a checkpoint's frozen encoder")
