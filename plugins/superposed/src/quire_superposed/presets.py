"""The settings that Shen et al. 2024 ship, by prompt length and number of drafts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quire.errors import ConfigError, suggest

LENGTHS = (1, 2, 3, 4, 5)
WEIGHTS = (0.01, 0.04, 0.15, 0.18, 0.12)


@dataclass(frozen=True)
class Preset:
    """One row of the table.

    Attributes:
        drafts: k.
        alpha: Share of the n-grams in the mixed score, in log space.
        temperature: Of the language model's distribution.
        tokens: m, tokens of it that are kept; None: 3k.
        lengths: Context lengths of the n-grams.
        weights: Their weights.
    """

    drafts: int
    alpha: float
    temperature: float
    tokens: int | None = None
    lengths: tuple[int, ...] = LENGTHS
    weights: tuple[float, ...] = WEIGHTS


DEFAULT = "p15_d3"
PRESETS: dict[str, Preset] = {
    "p15_d2": Preset(2, 0.62, 0.06, 6),
    "p15_d3": Preset(3, 0.54, 0.06, 9),
    "p15_d4": Preset(4, 0.52, 0.06, 12),
    "p15_d5": Preset(5, 0.60, 0.06, 15),
    "p15_d6": Preset(6, 0.52, 0.06, 18),
    "p15_d10": Preset(10, 0.54, 0.12, 30),
    "p5_d3": Preset(3, 0.34, 0.12, 15),
    "p25_d3": Preset(3, 0.50, 0.12, 15),
    "p40_d3": Preset(3, 0.55, 0.10),  # [U] the code leaves m open: 3k
    "generate_5": Preset(3, 0.52, 0.06, 15),
    "generate_15": Preset(3, 0.48, 0.06, 15),
    "generate_20": Preset(3, 0.50, 0.04, 15),
    "fourgram": Preset(3, 0.55, 0.10, 9, (1, 2, 3), (0.01, 0.04, 0.15)),
}


def chosen(name: str | None, drafts: int | None) -> Preset:
    """The preset of a name, the default one for None; another number of drafts frees m.

    Raises:
        ConfigError: no such preset.
    """
    if name is not None and name not in PRESETS:
        near = suggest(name, list(PRESETS)) or f"; there are {', '.join(PRESETS)}"
        raise ConfigError(f"Superposed: no preset is named {name}{near}")
    found = PRESETS[name or DEFAULT]
    return found if drafts in (None, found.drafts) else replace(found, drafts=drafts, tokens=None)
