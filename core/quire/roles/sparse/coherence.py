"""Numbers about the decoder's rows: how close two of them come, and how well they find planted directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from quire.contracts import Batch, Losses, Metric
from quire.errors import ConfigError
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.selector import tiny_run


class DecoderCoherence(Metric):
    """The largest |cosine| between two decoder rows, as they are when validation ends.

    Computed in blocks, so the F x F matrix is never whole.

    Args:
        block: Rows compared with all others at a time.

    Returns:
        A cosine in [0, 1]; 0 for a single row.

    Raises:
        ConfigError: ``block`` below 1.
    """

    full_state_update = False
    decoder: SparseDecoder
    seen: Tensor
    of: Any

    def __init__(self, block: int = 1024) -> None:
        super().__init__()
        if block < 1:
            raise ConfigError(f"DecoderCoherence.block must be at least 1, got {block}")
        self.block = block
        self.add_state("seen", torch.zeros(()), dist_reduce_fx="sum")
        self.refer("of", None)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Planted features, TopK with k = 2."""
        run = tiny_run({"class_path": "TopK", "init_args": {"k": 2}})
        run["model"]["metrics"] = ["DecoderCoherence"]
        return run

    def bind(self, model: Any) -> None:
        """Know the decoder."""
        self.refer("of", model.decoder.role(SparseDecoder))

    def update(self) -> None:
        """Nothing to gather: the rows are there at the end."""
        self.seen += 1

    def observe(self, model: Any, batch: Batch, losses: Losses) -> None:
        """See ``update``."""
        self.update()

    def compute(self) -> Tensor:
        """The largest |cosine|."""
        return coherence(self.of.W_dec, self.block)


@torch.no_grad()
def coherence(rows: Tensor, block: int = 1024) -> Tensor:
    """Largest |cosine| between two of ``rows`` [F,D], a scalar; at most ``block`` rows against the rest at a time."""
    rows = normalize(rows.float(), dim=1)
    most = rows.new_zeros(())
    for start in range(0, len(rows), block):
        cosines = (rows[start : start + block] @ rows[start:].T).abs()
        cosines.diagonal().zero_()
        most = torch.maximum(most, cosines.max())
    return most


class PlantedRecovery(Metric):
    """How well the decoder's rows find PlantedFeatures' directions: mean over these of the largest cosine.

    Returns:
        A cosine; 1 when every direction has a row of its own.

    Raises:
        ConfigError: the data has no ``directions``.
    """

    full_state_update = False
    decoder: SparseDecoder
    total: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(()), dist_reduce_fx="sum")

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Planted features, TopK with k = 2."""
        run = tiny_run({"class_path": "TopK", "init_args": {"k": 2}})
        run["model"]["metrics"] = ["PlantedRecovery"]
        return run

    def update(self, rows: Tensor, directions: Tensor) -> None:
        """Rows [F,D] against directions [M,D]."""
        self.total += recovery(rows, directions).mean()
        self.seen += 1

    def observe(self, model: Any, batch: Batch, losses: Losses) -> None:
        """The rows don't change within a validation: its first batch tells."""
        directions = getattr(model.datamodule, "directions", None)
        if directions is None:
            raise ConfigError(
                f"PlantedRecovery needs data with known directions; {type(model.datamodule).__name__} has none: "
                "use PlantedFeatures"
            )
        if not self.seen:
            self.update(model.decoder.role(SparseDecoder).W_dec, directions.to(model.device))

    def compute(self) -> Tensor:
        """The mean."""
        return self.total / self.seen.clamp(min=1)


@torch.no_grad()
def recovery(rows: Tensor, directions: Tensor) -> Tensor:
    """[M]: each direction's largest cosine with a row."""
    return (normalize(directions, dim=1) @ normalize(rows, dim=1).T).amax(1)
