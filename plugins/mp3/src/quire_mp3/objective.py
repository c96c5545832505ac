"""PositionPrediction: the whole method, in the paper's order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback
from torch import Tensor

from quire.contracts import Batch, Losses, Objective, Spec
from quire.errors import ConfigError
from quire.roles.masking import share
from quire.roles.tokens.contract import TokenEncoder
from quire_mp3.context import CONTEXTS, draw_context
from quire_mp3.modules import TINY, Guesses, PositionHead, decayed, position_loss, smoothed_target

if TYPE_CHECKING:
    from quire.model import Model


class PositionPrediction(Objective):
    """Predict where each token came from, given its content and a random context. Zhai et al. 2022.

    Tokens carry no positions. All of them are queries; keys and values of every layer are a random subset, the
    context, drawn once a step and sample. So a token is placed by what it looks like and what the context shows.
    Where ``model.decoder`` is a PositionHead it gives the logits; otherwise the objective has one of its own.

    Args:
        masking: Share of tokens left out of the context, in [0, 1): M = N - floor(masking N).
        context: ``random`` tokens; all but ``span``s of neighbours (1-D), or all but rectangular ``block``s (2-D).
            Neighbouring speech frames share samples, so a random context is solved by matching them; spans are not.
        span_length: Least length of a left-out span, in tokens.
        context_update: Whether keys and values come from each layer's own tokens; false takes the embedded ones.
        smoothing_sigma: Width of the Gaussian over neighbouring cells in the training target, in cells; 0 is hard.
            From DropPos (Wang et al. 2023), not MP3. Validation always has the hard target.
        smoothing_decay_steps: Optimizer steps over which the width falls linearly to 0; 0 keeps it.
        weight: Factor of the loss term.
        pictures: Images whose shuffled patches are put back in ``put_back.png`` at the end of fit; 0 for none.

    Needs:
        encoder: TokenEncoder with ``context`` and without positions (a frozen one may have them: then the head
            measures how much place is left in its codes). Reads ``image``, ``frames`` or ``tokens``.

    Returns:
        ``position``: mean cross-entropy over all real tokens [B,N,N], in nats; ln N at chance. Logged beside it:
        ``accuracy`` in [0,1], also over ``context``, ``rest``, ``nonconstant`` patches or ``voiced`` frames;
        ``accuracy_over_chance`` (1 at chance) and ``grid_distance``, the mean Manhattan distance in cells.

    Raises:
        ConfigError: ``masking`` outside [0, 1), no token left in the context, an encoder that adds positions.
        DataError: a sample of padding only.
    """

    encoder: TokenEncoder
    fields = ("image|frames|tokens",)
    requires = {"encoder": frozenset({"context"})}
    given = False  # whether model.decoder is the head

    def __init__(
        self,
        masking: float = 0.5,
        context: Literal["random", "span", "block"] = "random",
        span_length: int = 5,
        context_update: bool = True,
        smoothing_sigma: float = 0.0,
        smoothing_decay_steps: int = 0,
        weight: float = 1.0,
        pictures: int = 6,
    ) -> None:
        super().__init__()
        if context not in CONTEXTS:
            raise ConfigError(f"context must be one of {', '.join(CONTEXTS)}, got {context!r}")
        for name, value, least in (
            ("span_length", span_length, 1),
            ("smoothing_sigma", smoothing_sigma, 0),
            ("smoothing_decay_steps", smoothing_decay_steps, 0),
            ("pictures", pictures, 0),
        ):
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value:g}")
        self.masking, self.context, self.span_length = share("masking", masking), context, span_length
        self.context_update = context_update
        self.smoothing_sigma, self.smoothing_decay_steps = smoothing_sigma, smoothing_decay_steps
        self.weights = {"position": weight}
        self.pictures = pictures
        self.head: PositionHead | None = None

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Position prediction on digits."""
        return {"model": TINY, "data": "Digits"}

    def check(self, model: Model) -> None:
        """Refuse an encoder that tells the places; note whether the model's decoder is the head."""
        encoder = model.encoder.role(TokenEncoder)
        if encoder.positions != "none" and not encoder.frozen:
            raise ConfigError(
                f"encoder {type(encoder).__name__} adds positions ({encoder.positions}); set positions: none"
            )
        self.given = model.decoder is not None and model.decoder.role(PositionHead) is not None

    def build(self, spec: Spec) -> None:
        """Make the head, unless the decoder is one."""
        if not self.given:
            self.head = PositionHead()
        super().build(spec)

    def callbacks(self) -> list[Callback]:
        """The pictures."""
        from quire_mp3.callbacks import PutBackPictures

        return [PutBackPictures(images=self.pictures)] if self.pictures else []

    def forward(self, model: Model, batch: Batch) -> Losses:
        """The loss of one batch, and how well its tokens were placed."""
        guesses = self.guess(model, batch)
        sigma = decayed(self.smoothing_sigma, model.global_step, self.smoothing_decay_steps) if self.training else 0.0
        target = smoothed_target(guesses.layout, sigma) if sigma > 0 else None
        loss = position_loss(guesses.logits, guesses.cell, guesses.real, target)
        return Losses({"position": loss}, self._metrics(guesses), {"position": guesses})

    def guess(self, model: Model, batch: Batch, generator: torch.Generator | None = None) -> Guesses:
        """Where the tokens of a batch seem to have been.

        Args:
            model: The built model.
            batch: On the model's device.
            generator: Draws the context; the model's own when it isn't given.

        Returns:
            Logits [B,N,N] and what judges them.
        """
        encoder = model.encoder.role(TokenEncoder)
        head = self.head if self.head is not None else model.decoder.role(PositionHead)
        tokens = encoder.embed(batch)  # [B,N,D]
        rows, mask = len(tokens.values), tokens.mask if tokens.padded else None
        drawn, kept = draw_context(
            self.context,
            self.masking,
            self.span_length,
            tokens.layout,
            rows,
            mask,
            generator or model.generator(tokens.values.device),
        )
        whole = self.masking == 0 and self.context_update  # then the context is every token: plain attention
        codes = encoder.encode(tokens, context=None if whole else drawn, context_update=self.context_update)
        real = codes.mask & ~_special(batch, codes.mask)
        return Guesses(head(codes), codes.index, real, kept, tokens.layout, batch)  # label = cell, in natural order

    def _metrics(self, guesses: Guesses) -> dict[str, Any]:
        names = {"accuracy": "all", "accuracy_context": "context"}
        if self.masking > 0:
            names["accuracy_rest"] = "rest"
        first = guesses.layout.segments[0].field
        if first == "frames" and "audio" in guesses.batch:
            names["accuracy_voiced"] = "voiced"
        elif first == "image":
            names["accuracy_nonconstant"] = "nonconstant"
        found: dict[str, Any] = {
            name: lambda subset=subset: guesses.mean(guesses.right, subset) for name, subset in names.items()
        }
        found["accuracy_over_chance"] = lambda: guesses.mean(guesses.right) * guesses.layout.cells
        found["grid_distance"] = lambda: guesses.mean(guesses.distance)
        return found


def _special(batch: Batch, mask: Tensor) -> Tensor:
    """[B,N] bool, the tokens that mark a text's ends: always at the same place, so nothing to predict."""
    special = batch.get("special")
    return special.bool() if isinstance(special, Tensor) and special.shape == mask.shape else torch.zeros_like(mask)
