"""Where a token stands and how often the block has run: the signals added before every step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quire.errors import ConfigError

POSITIONS = ("coordinate", "random_offset", "rope", "learned", "none")
LAYOUTS = ("interleaved", "halves")
STEP_SIGNALS = ("learned", "sinusoid")


def sinusoid(places: Tensor, width: int, layout: str = "interleaved") -> Tensor:
    """Sine and cosine at rates 10000^(-2j/D).

    Args:
        places: […] numbers of positions or steps.
        width: D, even.
        layout: ``interleaved`` (even entries sine, odd ones cosine) or ``halves`` (sines, then cosines).

    Returns:
        […,D] fp32.
    """
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=places.device, dtype=torch.float32) / width)
    angles = places[..., None].float() * rates
    if layout == "halves":
        return torch.cat([angles.sin(), angles.cos()], -1)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


def coordinates(places: Tensor, step: int, width: int, layout: str = "interleaved") -> Tensor:
    """The paper's P^t at positions ``places`` […]: the sinusoid of the position plus that of the step. […,D]."""
    return sinusoid(places, width, layout) + sinusoid(torch.tensor(step, device=places.device), width, layout)


class Signals(nn.Module):
    """Adds position and step signals to a state.

    Args:
        width: D.
        position: ``coordinate`` or ``random_offset`` (sinusoids), ``learned`` (a table), ``rope`` or ``none``.
        step_signal: ``learned`` (one vector a step) or ``sinusoid``.
        layout: Of sinusoids.
        steps: Most steps, the size of the learned table.
        length: Size of a learned position table.
    """

    def __init__(self, width: int, position: str, step_signal: str, layout: str, steps: int, length: int) -> None:
        super().__init__()
        self.width, self.position, self.layout = width, position, layout
        self.steps = nn.Embedding(steps, width) if step_signal == "learned" else None
        self.places = nn.Embedding(length, width) if position == "learned" else None
        for table in (self.steps, self.places):
            if table is not None:
                nn.init.normal_(table.weight, std=0.1)

    def at(self, places: Tensor, like: Tensor) -> Tensor | None:
        """Position signals [B or 1,T,D] of one pass, or None where positions aren't added.

        Raises:
            ConfigError: a place beyond a learned table.
        """
        if self.position in ("coordinate", "random_offset"):
            return sinusoid(places, self.width, self.layout).to(like.dtype)
        if self.places is None:
            return None
        most = self.places.num_embeddings
        if not places.is_cuda and int(places.max()) >= most:
            raise ConfigError(f"position {int(places.max())} is beyond the learned table of {most}: use coordinate")
        return self.places(places)

    def forward(self, state: Tensor, step: int, where: Tensor | None) -> Tensor:
        """The state [B,T,D] with the signals of step 1, 2, … added.

        Raises:
            ConfigError: a step beyond the learned table.
        """
        if self.steps is None:
            signal = sinusoid(torch.tensor(step, device=state.device), self.width, self.layout).to(state.dtype)
        elif step > self.steps.num_embeddings:
            raise ConfigError(
                f"step {step} > table {self.steps.num_embeddings}: use step_signal sinusoid or train with more steps"
            )
        else:
            signal = self.steps.weight[step - 1]
        return state + signal if where is None else state + where + signal


def check_signals(name: str, width: int, position: str, step_signal: str, layout: str) -> None:
    """Raise ``ConfigError`` for unknown words, and for sinusoids of an odd width."""
    for key, value, known in (
        ("position", position, POSITIONS),
        ("step_signal", step_signal, STEP_SIGNALS),
        ("layout", layout, LAYOUTS),
    ):
        if value not in known:
            raise ConfigError(f"{name}.{key} is one of {', '.join(known)}, got {value!r}")
    if width % 2 and (position in ("coordinate", "random_offset") or step_signal == "sinusoid"):
        raise ConfigError(f"{name} has width={width}: sinusoids need an even width")
