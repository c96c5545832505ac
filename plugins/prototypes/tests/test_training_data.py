"""What is measured on all training data, and what starts or pushes prototypes there."""

import pytest
import torch
from safetensors.torch import save_file

from quire.errors import ConfigError
from quire_prototypes.callbacks import PushPrototypes, push
from quire_prototypes.distances import r1, r2, squared_distances
from quire_prototypes.metrics import (
    PrototypeClassCoverage,
    PrototypePixelDistance,
    PrototypesUsed,
    R1Full,
    R2Full,
)
from quire_prototypes.modules import codes_of
from quire_prototypes.objective import summed_error
from quire_prototypes.training import encode, scan

METRICS = (R1Full, R2Full, PrototypePixelDistance, PrototypeClassCoverage, PrototypesUsed)


def all_of(data):
    return data.dataset("train").__getitems__(list(range(len(data.dataset("train")))))


def test_metrics_agree_with_one_big_batch(make, digits, trainer):
    model, data = make(metrics=[m() for m in METRICS]), digits()
    logged = trainer().validate(model, datamodule=data, verbose=False)[0]
    whole, layer = all_of(data), model.decoder
    with torch.no_grad():
        distances = layer.distances(codes_of(model, whole))
        drawn = layer.pictures()
        pixels = torch.stack([torch.stack([summed_error(p[None], x[None]) for x in whole["image"]]) for p in drawn])
    assert logged["val/R1Full"] == pytest.approx(r1(distances).item(), rel=1e-5)
    assert logged["val/R2Full"] == pytest.approx(r2(distances).item(), rel=1e-5)
    assert logged["val/PrototypePixelDistance"] == pytest.approx(pixels.min(1).values.mean().item(), rel=1e-4)
    assert logged["val/PrototypeClassCoverage"] == len(layer.owners().unique())
    held = data.dataset("val").__getitems__(list(range(450)))
    assert logged["val/PrototypesUsed"] == len(layer.distances(codes_of(model, held)).argmin(1).unique())


def test_a_duplicated_prototype_is_allowed_and_counts_as_unused(make, digits, trainer):
    """Oracle 7."""
    model, data = make(metrics=[PrototypesUsed()]), digits()
    codes, labels = encode_with(model, data, trainer)
    layer = model.decoder
    layer.prototypes.data = codes[torch.stack([(labels == k).nonzero()[0, 0] for k in [*range(10), *range(5)]])]
    doubled = trainer().validate(model, datamodule=data, verbose=False)[0]
    assert doubled["val/PrototypesUsed"] <= 10
    assert torch.isfinite(torch.tensor(list(doubled.values()))).all()
    nearest = layer.distances(codes_of(model, all_of(data))).min(1).indices
    assert nearest.max() < 10, "the first of equals is nearest"


def encode_with(model, data, trainer):
    trainer().validate(model, datamodule=data, verbose=False)
    return encode(model, data)


def test_a_scan_is_kept_until_a_weight_changes(make, digits, trainer):
    model, data = make(), digits()
    trainer().validate(model, datamodule=data, verbose=False)
    first = scan(model, data)
    assert scan(model, data) is first
    trainer().fit(model, datamodule=data)
    second = scan(model, data)
    assert second is not first and not torch.equal(second.distance, first.distance)
    with torch.no_grad():
        model.decoder.prototypes.add_(1)
    assert scan(model, data) is not second


def test_a_scan_leaves_modes_and_random_streams_alone(make, digits, trainer):
    model, data = make(), digits()
    trainer().validate(model, datamodule=data, verbose=False)
    model.train()
    model.encoder.eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    scan(model, data)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_pushing_puts_prototypes_on_training_codes(make, digits, trainer):
    model, data = make(metrics=[R1Full()]), digits()
    codes, _ = encode_with(model, data, trainer)
    nearest = scan(model, data).nearest
    push(model, data)
    assert torch.equal(model.decoder.prototypes, codes[nearest])
    assert trainer().validate(model, datamodule=data, verbose=False)[0]["val/R1Full"] == 0


def test_pushes_come_when_asked(make, digits, trainer):
    class Spy(PushPrototypes):
        def on_train_epoch_end(self, trainer, pl_module):
            before = pl_module.decoder.prototypes.clone()
            super().on_train_epoch_end(trainer, pl_module)
            if not torch.equal(before, pl_module.decoder.prototypes):
                pushed.append(trainer.current_epoch + 1)

    pushed: list[int] = []
    trainer(7, callbacks=[Spy(every=2, start=3)]).fit(make(), datamodule=digits())
    assert pushed == [3, 5, 7]


@pytest.mark.parametrize("init", ["examples", "kmeans"])
def test_prototypes_may_start_on_training_codes_once(make, digits, trainer, init):
    model, data = make({"init": init}), digits()
    uniform = model.decoder.prototypes.clone()
    codes, labels = encode_with(model, data, trainer)
    trainer(0).fit(model, datamodule=data)  # the start alone
    assert bool(model.decoder.started)
    apart = squared_distances(model.decoder.prototypes, codes)
    if init == "examples":
        assert apart.min(1).values.max() == 0
        owners = labels[apart.argmin(1)]
        assert torch.equal(owners.bincount(minlength=10).sort().values, torch.tensor([1] * 5 + [2] * 5))
    else:
        assert apart.min(0).values.mean() < squared_distances(uniform, codes).min(0).values.mean() / 5
    model.decoder.prototypes.data.add_(1)
    kept = model.decoder.prototypes.clone()
    trainer(0).fit(model, datamodule=data)
    assert torch.equal(model.decoder.prototypes, kept)


def test_prototypes_may_start_from_a_tensor_in_a_file(make, digits, trainer, tmp_path):
    keys = torch.rand(3, 40, 10)
    save_file({"encoder.keys": keys, "narrow": torch.rand(15, 9), "few": torch.rand(4, 10)}, tmp_path / "w.safetensors")
    model = make({"init": f"{tmp_path}/w.safetensors#encoder.keys"})
    trainer(1, limit_train_batches=1).fit(model, datamodule=digits())
    assert torch.cdist(model.decoder.prototypes, keys.flatten(0, 1)).min(1).values.max() < 1
    for name, said in (("narrow", "have 10 features"), ("few", "4 rows for 15"), ("other", "no tensor other")):
        with pytest.raises(ConfigError, match=said):
            trainer(1).fit(make({"init": f"{tmp_path}/w.safetensors#{name}"}), datamodule=digits())


def test_prototypes_may_start_from_another_models_checkpoint(make, digits, trainer, tmp_path):
    model = make()
    run = trainer(1, limit_train_batches=1)
    run.fit(model, datamodule=digits())
    run.save_checkpoint(tmp_path / "a.ckpt")
    other = make({"init": f"{tmp_path}/a.ckpt#decoder.prototypes"}, seed=3)
    trainer(1, limit_train_batches=1).fit(other, datamodule=digits())
    torch.testing.assert_close(other.decoder.prototypes, model.decoder.prototypes, atol=5e-3, rtol=0)


def test_more_prototypes_than_samples_can_not_start_there(make, digits, trainer):
    with pytest.raises(ConfigError, match="300 prototypes can't start on 256 training samples"):
        trainer(1).fit(make({"init": "examples", "prototypes": 300}), datamodule=digits())


def test_metrics_without_a_data_module_say_so(make, digits, trainer):
    model = make(metrics=[R1Full()])
    with pytest.raises(ConfigError, match="R1Full looks at the training split of a data module"):
        trainer().validate(model, dataloaders=digits().val_dataloader(), verbose=False)


def test_pixel_distance_without_a_pixel_decoder_is_refused_when_the_model_is_made(make):
    with pytest.raises(ConfigError, match="PixelDecoder in PrototypeLayer.decoder, which is not set"):
        make({"decoder": None}, {"reconstruct": 0}, metrics=[PrototypePixelDistance()], build=False)


@pytest.mark.parametrize("given", [{"every": 0}, {"start": 0}])
def test_impossible_pushes_are_refused(given):
    with pytest.raises(ConfigError, match="PushPrototypes needs every >= 1"):
        PushPrototypes(**given)
