"""From fetched values to logits: a vote without parameters, or a probe. Träuble et al. 2023."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from quire.contracts import Spec
from quire.errors import ConfigError
from quire.roles.latent.contract import Classifier
from quire_dkvb.encoder import KeyValueBottleneck, ValueCodes, tiny_run


class CodebookVote(Classifier):
    """Logits as the mean of the fetched values over codebooks and tokens; no parameters. Träuble et al. 2023.

    With several keys a codebook their values are summed, each with weight 1.

    Needs:
        encoder: KeyValueBottleneck whose values have one number a class.

    Returns:
        Logits [B,K] of ValueCodes.

    Raises:
        ConfigError: another ``value_width`` than classes.
    """

    encoder: KeyValueBottleneck

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A vote on digits."""
        return tiny_run()

    def build(self, spec: Spec) -> None:
        """Compare the sizes."""
        width, classes = int(spec.code("value_width", self)), int(spec.need("classes", self))
        if width != classes:
            raise ConfigError(
                f"CodebookVote needs one value a class: KeyValueBottleneck.value_width is {width}, the data has "
                f"{classes} classes; drop value_width, or use ConcatProbe"
            )

    def forward(self, codes: ValueCodes) -> Tensor:
        """ValueCodes → [B,K]."""
        return codes.vote()


class ConcatProbe(Classifier):
    """A linear map or a small MLP on the values of all codebooks side by side, mean over tokens. Träuble et al. 2023.

    Args:
        hidden: Width of one hidden layer with a ReLU; 0 is a linear map. The paper's code uses 128.
        frozen: Leave it at its random start, so that only values learn; else it is trained along and forgets.

    Needs:
        encoder: KeyValueBottleneck.

    Returns:
        Logits [B,K] of ValueCodes.

    Raises:
        ConfigError: a negative ``hidden``.
    """

    encoder: KeyValueBottleneck

    def __init__(self, hidden: int = 0, frozen: bool = True) -> None:
        super().__init__()
        if hidden < 0:
            raise ConfigError(f"ConcatProbe.hidden must be at least 0, got {hidden}")
        self.hidden, self.still = hidden, frozen

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A frozen random map of the values on digits."""
        return tiny_run(decoder="ConcatProbe")

    def build(self, spec: Spec) -> None:
        """Make the map."""
        width, classes = int(spec.code("width", self)), int(spec.need("classes", self))
        if self.hidden:
            self.net: nn.Module = nn.Sequential(
                nn.Linear(width, self.hidden), nn.ReLU(), nn.Linear(self.hidden, classes)
            )
        else:
            self.net = nn.Linear(width, classes)
        self.net.requires_grad_(not self.still)

    def forward(self, codes: ValueCodes) -> Tensor:
        """ValueCodes → [B,K]."""
        return self.net(codes.vector)
