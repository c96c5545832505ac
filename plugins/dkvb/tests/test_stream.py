"""The class stream, what is measured over it, and the picture; against a stream worked by hand."""

import math

import pytest
import torch

from quire.data import DataModule, Fields
from quire.errors import ConfigError, DataError
from quire.model import Model
from quire.roles.latent.plain import FlatPixels
from quire.roles.probes.classify import Classify
from quire_dkvb.metrics import (
    BackwardTransfer,
    FinalAccuracy,
    FirstMinusLast,
    Forgetting,
    KeyPerplexity,
    KeyUtilisation,
)
from quire_dkvb.pictures import StreamPicture
from quire_dkvb.stream import ClassIncremental, Stream, labels_of, whole
from quire_dkvb.toy import ToyGaussians


class Labelled(DataModule):
    """Samples of given labels; the image is the sample's number."""

    fields = ("image", "label", "index")

    def __init__(self, train, val=(0, 1), classes=4, **given):
        super().__init__(**{"batch_size": 3, **given})
        self.given, self.classes = {"train": list(train), "val": list(val), "test": list(val)}, classes

    def split(self, name):
        label = torch.tensor(self.given[name])
        return Fields(image=torch.linspace(0, 1, len(label))[:, None, None, None], label=label)

    def sizes(self):
        return {"image_size": [1, 1], "channels": 1, "classes": self.classes}


TASKS = {"image_size": [8, 8], "channels": 1, "classes": 10, "tasks": [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]}
UNEVEN = [0] * 5 + [1] * 2 + [2] * 4 + [3] * 6
"""Splits of 7 and 10 samples."""


def epoch(data, number):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(loader)


def test_an_epoch_is_one_pass_over_its_split_and_all_have_as_many_batches():
    data = ClassIncremental(Labelled(UNEVEN), 2, 3)
    assert data.sizes()["tasks"] == [[0, 1], [2, 3]]
    for number in range(8):  # two more than the stream has: the last split goes on
        batches = epoch(data, number)
        own = {0, 1} if number < 3 else {2, 3}
        assert len(batches) == len(data.train_dataloader()) == 4, "10 samples, at most 3 a batch"
        assert max(len(b["label"]) for b in batches) <= 3
        index = torch.cat([b["index"] for b in batches])
        wanted = [i for i, k in enumerate(UNEVEN) if k in own]
        assert sorted(index.tolist()) == wanted, "each sample once, none dropped"
        assert set(torch.cat([b["label"] for b in batches]).tolist()) == own


def test_the_order_is_that_of_seed_and_epoch():
    first, again = (ClassIncremental(Labelled(UNEVEN), 2, 3) for _ in range(2))

    def orders(data):
        return [torch.cat([b["index"] for b in epoch(data, n)]).tolist() for n in range(2)]

    assert orders(first) == orders(again)
    assert orders(first)[0] != orders(first)[1]
    assert orders(first) != orders(ClassIncremental(Labelled(UNEVEN, seed=1), 2, 3))


def test_iid_has_the_same_steps_and_passes_and_mixes_the_classes():
    data = ClassIncremental(Labelled(UNEVEN), 2, 3, iid=True)
    stream = [epoch(data, n) for n in range(6)]
    assert {len(batches) for batches in stream} == {4}
    seen = torch.cat([b["index"] for batches in stream for b in batches])
    assert torch.equal(seen.bincount(), torch.full((17,), 3)), "three passes, as each split has"
    labels = [set(torch.cat([b["label"] for b in batches]).tolist()) for batches in stream]
    assert sum(not (found <= {0, 1} or found <= {2, 3}) for found in labels) >= 5


def test_the_class_order_is_drawn_by_seed():
    orders = [ClassIncremental(ToyGaussians(), 4, 1, order_seed=s).tasks() for s in (None, 1, 1, 2)]
    assert orders[0] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert orders[1] == orders[2] != orders[3] and orders[1] != orders[0]
    assert sorted(k for task in orders[1] for k in task) == list(range(8))


def test_processes_share_a_batch_and_a_started_epoch_goes_on():
    labels = torch.tensor(UNEVEN)
    parts = [(labels < 2).nonzero()[:, 0], (labels > 1).nonzero()[:, 0]]
    both = [Stream(labels, parts, 2, 1, False, 2, rank, 0) for rank in range(2)]
    one = Stream(labels, parts, 4, 1, False, 1, 0, 0)
    assert [sorted(a + b) for a, b in zip(*both)] == [sorted(batch) for batch in one]
    one.start = 2
    assert list(one) == list(Stream(labels, parts, 4, 1, False, 1, 0, 0))[2:]


def test_evaluation_holds_all_classes_and_lightning_tells_the_epoch(digits, trainer):
    seen, model = [], Model(encoder=FlatPixels(), objective=Classify())
    data = ClassIncremental(digits(), 5, 2)

    class Spy(StreamPicture):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((trainer.current_epoch, frozenset(batch["label"].tolist())))

    trainer(10, callbacks=[Spy()]).fit(model, datamodule=data)
    for number, labels in seen:
        assert labels <= set(data.tasks()[number // 2])
    assert set(labels_of(data.dataset("val")).tolist()) == set(range(10))


# ---- measured
HISTORY = torch.tensor([[0.9, 0.1, 0.0], [0.95, 0.8, 0.0], [0.5, 0.6, 0.7]])
"""max − last: (.95−.5 + .8−.6)/2 = .325; first − last: (.9−.5 + .8−.6)/2 = .3; by hand."""


@pytest.mark.parametrize(("metric", "wanted"), [(Forgetting, 0.325), (FirstMinusLast, 0.3), (BackwardTransfer, -0.3)])
def test_forgetting_is_max_minus_last_and_the_others_by_their_names(metric, wanted):
    assert metric().read(HISTORY) == pytest.approx(wanted, abs=1e-6)
    assert math.isnan(metric().read(HISTORY[:1])), "nothing to forget yet; logged as 0"


def test_metrics_over_a_run_are_those_of_its_confusions(make, digits, trainer):
    metrics = [FinalAccuracy(), Forgetting(), FirstMinusLast(), KeyUtilisation(), KeyPerplexity()]
    model = make(ready=False, metrics=metrics, spec=TASKS)
    data = ClassIncremental(digits(), 5, 2)
    run = trainer(10, limit_val_batches=1.0, check_val_every_n_epoch=1)
    run.fit(model, datamodule=data)
    found, history = run.callback_metrics, model.metrics[1].history
    assert not history.isnan().any()
    assert found["val/Forgetting"] == pytest.approx(float((history.amax(0) - history[-1])[:-1].mean()), abs=1e-6)
    assert found["val/FirstMinusLast"] == pytest.approx(float((history.diagonal() - history[-1])[:-1].mean()), abs=1e-6)
    batch = data.dataset("val").__getitems__(list(range(450)))
    model.eval()
    hit = model.objective.logits(model, batch).argmax(1) == batch["label"]
    by_class = torch.stack([hit[batch["label"] == k].float().mean() for k in range(10)])
    assert found["val/FinalAccuracy"] == pytest.approx(by_class.mean().item(), abs=1e-6)
    torch.testing.assert_close(history[-1], by_class.view(5, 2).mean(1))
    assert (history.triu(1) < 0.2).all(), "what was not shown is not known"
    usage = model.encoder.usage
    assert found["val/KeyUtilisation"] == pytest.approx((usage > 0).float().mean().item())
    share = usage / usage.sum(1, keepdim=True)
    entropy = -(share * share.clamp(min=1e-30).log()).sum(1)
    assert found["val/KeyPerplexity"] == pytest.approx(entropy.exp().mean().item(), rel=1e-4)


def test_a_test_run_continues_the_history(make, digits, trainer):
    model = make(metrics=[Forgetting()], spec=TASKS)
    data = ClassIncremental(digits(), 5, 1)
    run = trainer(5, limit_val_batches=1.0)
    run.fit(model, datamodule=data)
    again = trainer().test(model, datamodule=data, verbose=False)[0]
    assert again["test/Forgetting"] == pytest.approx(float(run.callback_metrics["val/Forgetting"]), abs=1e-6)


def test_the_picture_is_drawn_and_reads_what_validation_found(make, digits, trainer, tmp_path):
    picture = StreamPicture()
    run = trainer(5, limit_val_batches=1.0, callbacks=[picture])
    run.fit(make(ready=False), datamodule=ClassIncremental(digits(), 5, 1))
    assert (tmp_path / "stream.png").is_file()
    assert sorted(picture._rows) == [0, 1, 2, 3, 4]
    assert picture._rows[0][2:].max() < 0.2 and picture._rows[4].mean() == pytest.approx(
        float(run.callback_metrics["val/accuracy"]), abs=0.03
    )


def test_toy_points_are_small_gaussians_in_the_unit_square():
    data = ToyGaussians()
    points, label = (data.dataset("train").tensors[k] for k in ("image", "label"))
    points = points.flatten(1)
    assert points.shape == (800, 2) and points.min() >= 0 and points.max() <= 1
    means = torch.stack([points[label == k].mean(0) for k in range(8)])
    assert torch.pdist(means).min() > 0.25
    assert (points - means[label]).std() == pytest.approx(0.035, abs=0.002)


# ---- a base that can't be indexed
class Batches(Labelled):
    """Only loaders, as activations of a frozen subject."""

    def dataset(self, name):
        raise NotImplementedError

    def train_dataloader(self):
        rows = Labelled.split(self, "train").__getitems__([2, 0, 1, 3])
        return [{**{k: v[:2] for k, v in rows.items()}, "index": torch.tensor([2, 0])},
                {**{k: v[2:] for k, v in rows.items()}, "index": torch.tensor([1, 3])}]  # fmt: skip


def test_batches_are_read_once_into_memory_in_the_samples_order():
    base = Batches([0, 1, 2, 3])
    found = whole(base, "train")
    assert found.tensors["label"].tolist() == [0, 1, 2, 3] and whole(base, "train") is found


# ---- bad input
def test_splits_that_do_not_divide_the_classes_are_refused_with_both_numbers():
    with pytest.raises(ConfigError, match="data.splits is 3, which does not divide the 4 classes"):
        ClassIncremental(Labelled(UNEVEN), 3).sizes()


def test_a_label_that_training_never_shows_is_refused():
    data = ClassIncremental(Labelled([0, 1, 2], val=[0, 3]), 2)
    data.dataset("train")
    with pytest.raises(DataError, match="label 3 of the val split never occurs in training"):
        data.dataset("val")


def test_a_label_outside_the_stream_and_an_empty_split_are_refused():
    with pytest.raises(DataError, match="label 7 of train sample 1 is in no split: the stream has 4 classes"):
        ClassIncremental(Labelled([0, 7]), 2).dataset("train")
    with pytest.raises(DataError, match=r"split 1 \(classes \[2, 3\]\) has no training sample"):
        ClassIncremental(Labelled([0, 1, 1]), 2).dataset("train")


def test_data_without_labels_are_refused(trainer):
    base = Labelled(UNEVEN)
    base.fields = ("image",)
    with pytest.raises(ConfigError, match="splits by label; data.base Labelled offers image"):
        ClassIncremental(base, 2).setup("fit")


def test_another_number_of_epochs_than_the_stream_has_warns(digits, trainer):
    data = ClassIncremental(digits(), 5, 2)
    model = Model(encoder=FlatPixels(), objective=Classify())
    with pytest.warns(UserWarning, match="5 x 2 = 10 epochs, trainer.max_epochs is 4: set it to 10"):
        trainer(4).fit(model, datamodule=data)


def test_stream_metrics_and_picture_need_a_stream(digits, trainer):
    with pytest.raises(ConfigError, match="Forgetting needs a stream of classes: wrap data in ClassIncremental"):
        trainer().fit(Model(encoder=FlatPixels(), objective=Classify(), metrics=[Forgetting()]), datamodule=digits())
    with pytest.raises(ConfigError, match="StreamPicture draws a stream of classes; data is Digits"):
        trainer(callbacks=[StreamPicture()]).fit(Model(encoder=FlatPixels(), objective=Classify()), datamodule=digits())


@pytest.mark.parametrize("given", [{"splits": 0}, {"epochs_per_split": 0}])
def test_impossible_counts_are_refused(given):
    with pytest.raises(ConfigError, match="needs splits and epochs_per_split of at least 1"):
        ClassIncremental(Labelled(UNEVEN), **given)
