"""Objectives of several papers, trained together on one encoder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from quire.contracts import Batch, Losses, Objective, Role
from quire.errors import ConfigError

if TYPE_CHECKING:
    from quire.model import Model


class Sum(Objective):
    """Several objectives on one encoder: the sum of their weighted terms.

    Args:
        objectives: The members, in order; a term or metric name used twice is prefixed with its objective's name.
        weights: One factor per member; default 1 each.

    Returns:
        Every term of every member, in that member's unit.

    Raises:
        ConfigError: no members, a weight too many or too few, or two members with several players.
    """

    def __init__(self, objectives: list[Objective], weights: list[float] | None = None) -> None:
        super().__init__()
        if not objectives:
            raise ConfigError("Sum needs at least one objective")
        factors = weights if weights is not None else [1.0] * len(objectives)
        if len(factors) != len(objectives):
            raise ConfigError(f"Sum has {len(objectives)} objectives and {len(factors)} weights: give one each")
        playing = [o for o in objectives if o.players]
        if len(playing) > 1:
            raise ConfigError("Sum can hold one objective with several players, got 2 or more")
        self.members = nn.ModuleList(objectives)
        self.factors = factors
        self.weights = {}
        self.refer("playing", playing[0] if playing else None)
        self.players = playing[0].players if playing else ()  # type: ignore[misc]

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Masked reconstruction and classification of digits on one encoder."""
        return {
            "model": {
                "encoder": {"class_path": "ViTEncoder", "init_args": {"patch": 2, "width": 16, "depth": 1, "heads": 2}},
                "decoder": {"class_path": "GridDecoder", "init_args": {"width": 16, "depth": 1, "heads": 2}},
                "objective": {
                    "class_path": "Sum",
                    "init_args": {"objectives": [{"class_path": "MaskedReconstruction"}, {"class_path": "Classify"}]},
                },
            },
            "data": "Digits",
        }

    def forward(self, model: Model, batch: Batch, player: str | None = None) -> Losses:
        """All members' terms; members without players join the first player's step."""
        joined = Losses({})
        weights: dict[str, float] = {}
        for objective, factor in zip(self.members, self.factors):
            assert isinstance(objective, Objective)
            if objective is self.playing:
                losses = objective(model, batch, player=player)
            elif player is None or player == self.players[0]:
                losses = objective(model, batch)
            else:
                continue
            for old, value in losses.items():
                name = f"{type(objective).__name__}.{old}" if old in joined else old
                joined[name] = value
                weights[name] = factor * objective.weights.get(old, 1.0)
            for old, metric in losses.metrics.items():
                joined.metrics[f"{type(objective).__name__}.{old}" if old in joined.metrics else old] = metric
            joined.outputs.update(losses.outputs)
        self.weights = weights
        return joined

    def parameters_of(self, model: Model, player: str) -> Iterable[nn.Parameter]:
        """As the member with players says; the other members' own parameters go with the first player."""
        yield from self.playing.parameters_of(model, player)
        if player == self.players[0]:
            for objective in self.members:
                if objective is not self.playing:
                    yield from objective.parameters()

    def role(self, role: type[Role]) -> Role | None:
        """The one member that has ``role``; None when none or several do."""
        found = [r for o in self.members if isinstance(o, Objective) and (r := o.role(role)) is not None]
        return found[0] if len(found) == 1 else None

    playing: ClassVar[Any] = None
