"""A run that is stopped and resumed ends at the bits of one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tests.sparse.toys import D, F

from quire import Model
from quire.datasets.planted import PlantedFeatures
from quire.roles.sparse.bank import BankMember, DictionaryBank
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.objective import SparseReconstruction
from quire.roles.sparse.resample import Resample
from quire.roles.sparse.selectors import BatchTopK, TopK
from quire.schedule import Constant

ADAM: Any = {"class_path": "torch.optim.Adam", "init_args": {"lr": 3e-3}}


def single() -> Model:
    parts = SparseEncoder(F, BatchTopK(3), norm="global_rms"), SparseDecoder(), SparseReconstruction(dead_after=60)
    return Model(*parts, optimizer=ADAM, schedule=Constant())


def bank() -> Model:
    members = [BankMember(SparseEncoder(F, TopK(k)), objective=SparseReconstruction(dead_after=60)) for k in (2, 3)]
    return Model(objective=DictionaryBank(members), optimizer=ADAM, schedule=Constant())


def fit(make: Any, folder: Path, callbacks: list[Any], file: Path | None = None) -> Model:
    pl.seed_everything(0, verbose=False)
    model = make()
    saver = pl.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=10, save_top_k=-1)
    trainer = pl.Trainer(
        max_steps=20,
        accelerator="cpu",
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        logger=False,
        callbacks=[saver, *callbacks],
    )
    data = PlantedFeatures(width=D, features=24, samples=512, batch_size=64)
    trainer.fit(model, datamodule=data, ckpt_path=file)
    return model


@pytest.mark.parametrize("make", [single, bank])
def test_twenty_steps_are_ten_and_ten_to_the_bit(make: Any, tmp_path: Path) -> None:
    def extra() -> list[Any]:
        return [Resample(every=7, cutoff=0.0, batches=5)] if make is single else []

    straight = fit(make, tmp_path / "straight", extra()).state_dict()
    resumed = fit(make, tmp_path / "again", extra(), tmp_path / "straight" / "step=10.ckpt").state_dict()
    assert set(straight) == set(resumed)
    for name in straight:
        assert torch.equal(straight[name], resumed[name]), name
