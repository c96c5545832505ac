"""What a report shows, as plain data: the page is a function of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from quire.roles.sparse.result import Card


@dataclass
class Piece:
    """One token of a context: its text, and how active the latent is on it."""

    text: str
    value: float = 0.0


@dataclass
class Context:
    """One place where a latent fires.

    Attributes:
        peak: Its largest activation here.
        where: Row of the source and position of the peak.
        pieces: Tokens around the peak, in order; the peak's number among them is ``at``.
        at: See ``pieces``.
        picture: The whole image as a data URI, instead of tokens.
        grid: (rows, columns) of patches.
        heat: Activation of every patch, row by row.
    """

    peak: float
    where: tuple[int, int]
    pieces: list[Piece] = field(default_factory=list)
    at: int = 0
    picture: str = ""
    grid: tuple[int, int] = (0, 0)
    heat: list[float] = field(default_factory=list)


@dataclass
class Latent:
    """One latent.

    Attributes:
        number: Its index in the dictionary.
        fired: Tokens that it is active on.
        share: The same over all tokens.
        peak: Its largest activation.
        histogram: Firings by activation, in equal bins from 0 to ``peak``.
        up: The tokens whose logits its row raises most, with by how much.
        down: The same, lowers.
        heads: Share of each attention head; empty where there are none.
        contexts: Strongest first.
    """

    number: int
    fired: int
    share: float
    peak: float
    histogram: list[int]
    up: list[tuple[str, float]] = field(default_factory=list)
    down: list[tuple[str, float]] = field(default_factory=list)
    heads: list[float] = field(default_factory=list)
    contexts: list[Context] = field(default_factory=list)


@dataclass
class Report:
    """Everything on the page.

    Attributes:
        title: Heading.
        about: What was read, by name.
        density: Latents in each bin of ``edges``, log10 of the share of tokens.
        edges: Bounds of the bins.
        latents: The shown ones.
        heads: What the heads' shares mean; empty without them.
        card: The run's card, if it has one.
        notes: Sentences.
    """

    title: str
    about: dict[str, str]
    density: list[int]
    edges: list[float]
    latents: list[Latent]
    heads: str = ""
    card: Card | None = None
    notes: list[str] = field(default_factory=list)
