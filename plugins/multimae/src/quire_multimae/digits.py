"""Digits with their edges and levels: a multi-modal data set in every install."""

from __future__ import annotations

from typing import Any, ClassVar

from quire.data import Fields
from quire.datasets.images import Digits
from quire.errors import ConfigError
from quire_multimae.adapters import tiny_run
from quire_multimae.derived import quantize, sobel


class DigitModalities(Digits):
    """scikit-learn's digits with Sobel edges and maps of grey levels; modalities as in Bachmann et al. 2022, embedded.

    Fields: image [B,1,8,8] in [0,1], edges [B,1,8,8] in [0,1], semantic [B,8,8] int64, label [B].

    Args:
        levels: Number of levels, the classes of ``semantic``.
        **kwargs: Arguments of ``Digits``, ``TrainTest`` and ``DataModule``.

    Raises:
        ConfigError: fewer than 2 levels.
    """

    fields: ClassVar[tuple[str, ...]] = ("image", "edges", "semantic", "label", "index")  # type: ignore[assignment]

    def __init__(self, levels: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if levels < 2:
            raise ConfigError(f"data.levels must be at least 2, got {levels}")
        self.levels = levels

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """MultiMAE on digits, their edges and their levels."""
        return tiny_run()

    def load(self, part: str) -> Fields:
        """One part, in memory."""
        made = super().load(part).tensors
        image = made["image"]
        return Fields(**made, edges=sobel(image), semantic=quantize(image, self.levels))

    def sizes(self) -> dict[str, Any]:
        """image_size, channels, classes of the label, and what each modality is."""
        said = super().sizes()
        size = said["image_size"]
        return {
            **said,
            "modalities": {
                "image": {"channels": said["channels"], "size": size},
                "edges": {"channels": 1, "size": size},
                "semantic": {"classes": self.levels, "size": size},
            },
        }
