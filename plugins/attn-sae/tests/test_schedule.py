"""The rate rises by a cosine, and again after each resampling."""

import pytest
from attn_toys import feed
from lightning.pytorch import Callback, Trainer
from torch.optim import Adam

from quire.errors import ConfigError
from quire.model import Model
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.objective import SparseReconstruction
from quire.roles.sparse.resample import Resample
from quire.roles.sparse.selectors import TopK
from quire_attn_sae.schedule import CosineWarmupRewarm


def test_the_rise_is_a_cosine_and_begins_anew():  # oracle
    curve = CosineWarmupRewarm(0.1, 1000)
    assert curve.factor(0, 1e9) == pytest.approx(0.1) and curve.factor(1000, 1e9) == 1
    assert curve.factor(500, 1e9) == pytest.approx(0.55) and curve.factor(10**8, float("inf")) == 1
    curve.again = [2000, 5000]
    assert curve.factor(1999, 1e9) == 1 and curve.factor(2000, 1e9) == pytest.approx(0.1)
    assert curve.factor(2500, 1e9) == pytest.approx(0.55) and curve.factor(4000, 1e9) == 1
    assert curve.factor(5000, 1e9) == pytest.approx(0.1)


class Rates(Callback):
    def __init__(self):
        self.seen = {}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen[trainer.global_step] = optimizer.param_groups[0]["lr"]


def run(steps, folder, checkpoint=None, callbacks=()):
    data = feed(analysis=False, batch_size=8, buffer=32)
    parts = (SparseEncoder(64, TopK(2), init="kaiming"), SparseDecoder(), SparseReconstruction(auxk=0.0))
    model = Model(*parts, optimizer=lambda p: Adam(p, lr=1.0), schedule=CosineWarmupRewarm(0.1, 4))
    rates = Rates()
    trainer = Trainer(
        max_steps=steps,
        callbacks=[Resample(every=6, times=1, cutoff=0.0), rates, *callbacks],
        logger=False,
        enable_progress_bar=False,
        accelerator="cpu",
        enable_checkpointing=False,
        limit_val_batches=0,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
    return rates.seen, trainer


def test_the_first_step_after_a_resampling_has_the_low_rate(tmp_path):  # oracle: the same after a resample
    seen, _ = run(12, tmp_path)
    curve = [0.1, 0.1 + 0.9 * 0.146447, 0.55, 0.1 + 0.9 * 0.853553, 1.0, 1.0]
    assert [seen[i] for i in range(12)] == pytest.approx([*curve, *curve], abs=1e-5)
    part, stopped = run(8, tmp_path)
    stopped.save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    rest, _ = run(12, tmp_path, tmp_path / "half.ckpt")
    assert {**part, **rest} == pytest.approx(seen)  # a resumed run goes on in the second rise


@pytest.mark.parametrize("given", [{"start": 1.5}, {"steps": 0}])
def test_bad_numbers_are_refused(given):
    with pytest.raises(ConfigError, match=r"start in \[0, 1\] and steps >= 1"):
        CosineWarmupRewarm(**given)
