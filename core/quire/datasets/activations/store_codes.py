"""The callback that stores codes while a model is validated, tested or run."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback

from quire.contracts import Batch
from quire.data import expand
from quire.datasets.activations.codes import CodeWriter
from quire.datasets.activations.forwards import rows_of
from quire.errors import ConfigError
from quire.roles.sites.subject import fingerprint_of
from quire.roles.sparse.encoder import SparseEncoder


class StoreCodes(Callback):
    """Write the sparse encoder's codes of a split into a CodeStore, in ``validate``, ``test`` or ``predict``.

    Args:
        path: The store's folder.

    Raises:
        ConfigError: a folder with another encoder's codes, or batches without ``instance`` and ``position``.
    """

    encoder: SparseEncoder

    def __init__(self, path: str) -> None:
        self.path = path
        self._writer: CodeWriter | None = None

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Codes of a small dictionary."""
        import tempfile

        from quire.datasets.activations.module import Activations

        run = Activations.tiny()
        path = tempfile.mkdtemp() + "/codes"
        return {**run, "trainer": {"callbacks": [{"class_path": cls.__name__, "init_args": {"path": path}}]}}

    def _begin(self, trainer: Any, model: Any) -> None:
        encoder = None if model.encoder is None else model.encoder.role(SparseEncoder)
        if encoder is None:
            raise ConfigError("StoreCodes needs a SparseEncoder as model.encoder")
        self._encoder = encoder
        said = fingerprint_of(encoder)
        self._writer = CodeWriter(expand(self.path), encoder.latents, said, trainer.global_rank, fresh=True)

    def _store(self, batch: Batch) -> None:
        assert self._writer is not None
        rows = dict(rows_of(batch)) if batch["activation"].ndim == 3 else batch
        with torch.no_grad():
            codes = self._encoder(rows)
        self._writer.add(codes, rows)

    def _end(self, trainer: Any) -> None:
        if self._writer is None:
            return
        self._writer.runs.close()
        trainer.strategy.barrier("codes")
        if trainer.is_global_zero:
            self._writer.finish()
        self._writer = None

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the store."""
        self._begin(trainer, pl_module)

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Store a batch."""
        self._store(batch)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Sort."""
        self._end(trainer)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the store."""
        self._begin(trainer, pl_module)

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Store a batch."""
        self._store(batch)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Sort."""
        self._end(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the store; not while a fit validates."""
        if trainer.state.fn == "validate":
            self._begin(trainer, pl_module)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Store a batch."""
        if self._writer is not None:
            self._store(batch)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Sort."""
        self._end(trainer)
