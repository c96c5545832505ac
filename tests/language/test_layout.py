from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from tests.language.toys import batch, language_model, prompts

from quire import Model
from quire.datasets.text import TextTokens
from quire.roles.language.layout import laid_out
from quire.roles.language.loop import Greedy
from quire.roles.language.models import CausalLM
from quire.roles.language.next_token import NextToken

MKL = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch has no MKL")


def columns(model: torch.nn.Module) -> set[bool]:
    """Whether the linear weights lie column by column."""
    return {m.weight.stride(0) == 1 for m in model.modules() if isinstance(m, torch.nn.Linear)}


@MKL
def test_weights_lie_column_by_column_inside_and_nothing_else_changes():
    model, given = language_model(), batch(prompts())
    decoder, before = model.decoder, {k: v.clone() for k, v in model.decoder.state_dict().items()}
    want = Greedy(16)(model, given).tokens
    with laid_out(decoder) as count:
        assert columns(decoder) == {True} and count == sum(isinstance(m, torch.nn.Linear) for m in decoder.modules())
        assert Greedy(16)(model, given).tokens == want
        assert all(torch.equal(v, before[k]) for k, v in decoder.state_dict().items())
        assert decoder.head.weight is decoder.token.weight
    assert columns(decoder) == {False}
    assert Greedy(16)(model, given).tokens == want


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_stay_as_they_are(dtype):
    decoder = language_model().decoder.to(dtype)
    with laid_out(decoder) as count:
        assert count == 0 and columns(decoder) == {False}


def run_of(folder, *callbacks):
    return pl.Trainer(
        accelerator="cpu", max_steps=1, limit_val_batches=0, limit_predict_batches=1, callbacks=list(callbacks),
        default_root_dir=folder, enable_model_summary=False, logger=False, enable_checkpointing=False,
        enable_progress_bar=False,
    )  # fmt: skip


@MKL
def test_a_run_that_fails_puts_them_back(tmp_path):
    class Fails(pl.Callback):
        def on_predict_batch_start(self, trainer, pl_module, *args):
            assert columns(pl_module.decoder) == {True}
            raise ValueError("no more")

    model = Model(decoder=CausalLM(width=32, depth=1, heads=2), objective=NextToken(), sampler=Greedy(4))
    with pytest.raises(ValueError, match="no more"):
        run_of(tmp_path, Fails()).predict(model, datamodule=TextTokens(length=16, batch_size=8, train_samples=64))
    assert columns(model.decoder) == {False}


@MKL
def test_a_prediction_run_lays_them_out_and_training_does_not(tmp_path):
    seen = {}

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            seen["fit"] = columns(pl_module.decoder)

        def on_predict_batch_start(self, trainer, pl_module, *args):
            seen["predict"] = columns(pl_module.decoder)

    model = Model(decoder=CausalLM(width=32, depth=1, heads=2), objective=NextToken(), sampler=Greedy(4))
    data = TextTokens(length=16, batch_size=8, train_samples=64)
    trainer = run_of(tmp_path, Look())
    trainer.fit(model, datamodule=data)
    trainer.predict(model, datamodule=data)
    assert seen == {"fit": {False}, "predict": {True}} and columns(model.decoder) == {False}
