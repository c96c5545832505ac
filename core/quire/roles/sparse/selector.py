"""The contract of selectors: which latents of a token are kept.

A selector gets every latent's pre-activation and gives codes. The encoder attaches the kept values to the graph again,
so a selector says *which*, and is free to say it by whatever it likes: ``Selection`` has the input, the decoder's rows
and every field of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from quire.contracts import Batch, Part
from quire.errors import ConfigError
from quire.roles.sparse.codes import SparseCodes

if TYPE_CHECKING:
    from quire.model import Model


@dataclass
class Selection:
    """What a selector may look at; nothing here has a gradient but ``pre`` on the dense path.

    Attributes:
        x: [N,D] normalised input x~.
        u: [N,D] what the encoder's matrix sees: x~, less b_dec where the encoder subtracts it.
        pre: [N,F] pre-activations, float32 at least, for selectors with ``needs_pre``; relu of it is the ``z`` that
            ``select`` gets. None for others.
        decoder_rows: [F,D] decoder, detached; None without a decoder. ``rows`` refuses None.
        scale: [N,1] that x~ was divided by, or None.
        batch: The batch.
        training: Whether this is a training step.
        model: The model, for its generator; None outside one.
        asker: Name of the selector, for refusals.
    """

    x: Tensor
    u: Tensor
    batch: Batch
    training: bool
    pre: Tensor | None = None
    decoder_rows: Tensor | None = None
    scale: Tensor | None = None
    model: Model | None = field(default=None, repr=False)
    asker: str = "the selector"

    @property
    def rows(self) -> Tensor:
        """[F,D] decoder rows. Raises ``ConfigError`` when the model has no sparse decoder."""
        if self.decoder_rows is None:
            raise ConfigError(f"{self.asker} reads the decoder's rows: set model.decoder to SparseDecoder")
        return self.decoder_rows

    def prefix(self, length: int) -> Selection:
        """The same with only the first latents."""
        rows = None if self.decoder_rows is None else self.decoder_rows[:length]
        pre = None if self.pre is None else self.pre[:, :length]
        return replace(self, pre=pre, decoder_rows=rows)

    def given(self, name: str) -> Tensor | None:
        """A batch field, one row a token [N,...], or None when the batch has none."""
        value = self.batch.get(name)
        if not isinstance(value, Tensor):
            return None
        lead = self.batch["activation"].ndim - 1 if "activation" in self.batch else 1
        return value.flatten(0, lead - 1) if value.ndim >= lead > 1 else value

    def need(self, name: str, remedy: str = "") -> Tensor:
        """The same. Raises ``ConfigError`` with the field and the remedy when there is none."""
        value = self.given(name)
        if value is None:
            raise ConfigError(f"{self.asker} needs the batch field {name!r}{remedy and ': ' + remedy}")
        return value

    def gradient(self, remedy: str = "") -> Tensor:
        """[N,D] of the loss with respect to x~: the field ``grad`` times ``scale``, in the weights' precision."""
        grad = self.need("grad", remedy).to(self.x.dtype)
        return grad if self.scale is None else grad * self.scale


class Selector(Part):
    """Role of a selector.

    Attributes:
        needs_fields: Batch fields that it reads; ``reads(stage)`` may differ by stage.
        ranks: Whether it has an order of the latents, ``scores``, that another selector can cut elsewhere.
        needs_ranking: Whether it cuts the order of another selector, which must then rank.
        needs_pre: Whether it looks at pre-activations below 0 too (``Selection.pre``).
        exports: What it is in other projects' files: ``relu``, ``topk``, ``batchtopk`` or ``jumprelu``; None if nothing
            there does the same in evaluation. A subclass of TopK is written as topk, with a note.
        counts: Whether its codes have ``count``, a number of active latents with a gradient.
        keeps: About how many latents a token keeps; None is unknown or many, which takes the dense path.
    """

    needs_fields: tuple[str, ...] = ()
    ranks: ClassVar[bool] = False
    needs_ranking: ClassVar[bool] = False
    needs_pre: ClassVar[bool] = False
    counts: ClassVar[bool] = False
    exports: ClassVar[str | None] = None

    @property
    def keeps(self) -> int | None:
        """See the class."""
        return None

    def reads(self, stage: str) -> tuple[str, ...]:
        """``needs_fields`` in every stage."""
        return self.needs_fields

    def scores(self, z: Tensor, context: Selection) -> Tensor:
        """[N,F], the higher the sooner kept; a latent with z = 0 is never active. Here ``z`` itself."""
        return z

    def select(self, z: Tensor, context: Selection) -> SparseCodes:
        """The kept latents.

        Args:
            z: [N,F] activations, 0 and up, float32 at least; has a graph on the dense path.
            context: What else there is to look at.

        Returns:
            Codes whose values are entries of ``z``, short rows or dense.
        """
        raise NotImplementedError

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small dictionary on planted features with this selector."""
        return tiny_run(cls.__name__)


def ranking(selector: Selector, asker: str) -> Selector:
    """``selector`` if it ranks latents. Raises ``ConfigError`` naming both when it doesn't."""
    if not selector.ranks:
        name = type(selector).__name__
        raise ConfigError(f"{asker} ranks latents; {name} has no order of them: choose one that has, such as TopK")
    return selector


def tiny_run(selector: Any, objective: Any = "SparseReconstruction", **encoder: Any) -> dict[str, Any]:
    """A dictionary of 24 latents on planted features of width 8: what ``tiny()`` of sparse components is made from."""
    given = {"latents": 24, "selector": selector, **encoder}
    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}
    return {
        "model": {
            "encoder": {"class_path": "SparseEncoder", "init_args": given},
            "decoder": "SparseDecoder",
            "objective": objective,
            "optimizer": adam,
            "schedule": "Constant",
        },
        "data": {
            "class_path": "PlantedFeatures",
            "init_args": {"width": 8, "features": 12, "active": 2, "samples": 256, "batch_size": 32},
        },
    }


def check_kept(k: int, asker: Selector) -> int:
    """``k`` if it is at least 1; else ``ConfigError``."""
    if k < 1:
        raise ConfigError(f"{type(asker).__name__}.k must be at least 1, got {k}")
    return k


def check_fits(k: int, latents: int) -> None:
    """Raise ``ConfigError`` when more latents are to be kept than there are."""
    if k > latents:
        raise ConfigError(f"k ({k}) exceeds latents ({latents})")


def gathered(z: Tensor, indices: Tensor) -> SparseCodes:
    """Codes with the values of ``z`` at ``indices`` [N,K]."""
    return SparseCodes(z.gather(1, indices), indices, z.shape[1])


@torch.no_grad()
def largest(scores: Tensor, k: int) -> Tensor:
    """[N,k] indices of the largest, in no order; float32 at least, since half precision ties."""
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    return scores.topk(k, 1, sorted=False).indices
