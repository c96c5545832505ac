"""Baselines that need no gradient: their answers are those of scikit-learn on the samples they were shown."""

import pytest

from quire.errors import ConfigError
from quire.model import Model
from quire.roles.latent import VectorCodes
from quire.roles.latent.plain import FlatPixels
from quire.roles.probes.classify import Classify
from quire_dkvb.baselines import NearestMean, NearestNeighbours
from quire_dkvb.stream import ClassIncremental


def fitted(decoder, digits, trainer, epochs=5):
    model = Model(encoder=FlatPixels(), decoder=decoder, objective=Classify())
    data = ClassIncremental(digits(), 5, epochs // 5)
    trainer(epochs).fit(model, datamodule=data)
    held = data.dataset("val").__getitems__(list(range(450)))
    rows = data.dataset("train").__getitems__(list(range(256)))
    model.eval()
    answer = model.decoder(VectorCodes(held["image"].flatten(1))).argmax(1)
    return answer, rows["image"].flatten(1), rows["label"], held["image"].flatten(1)


def test_the_nearest_mean_is_scikit_learns_whatever_the_order_of_classes(digits, trainer):
    from sklearn.neighbors import NearestCentroid

    answer, rows, label, held = fitted(NearestMean(), digits, trainer, 10)
    wanted = NearestCentroid().fit(rows.numpy(), label.numpy()).predict(held.numpy())
    assert (answer.numpy() == wanted).mean() > 0.995


@pytest.mark.parametrize("k", [1, 5])
def test_neighbours_vote_as_scikit_learns_do(digits, trainer, k):
    from sklearn.neighbors import KNeighborsClassifier

    answer, rows, label, held = fitted(NearestNeighbours(k, memory=256), digits, trainer)
    reference = KNeighborsClassifier(k).fit(rows.numpy(), label.numpy())
    votes = reference.predict_proba(held.numpy())
    clear = (votes == votes.max(1, keepdims=True)).sum(1) == 1
    assert clear.mean() > 0.8
    assert (answer.numpy() == reference.predict(held.numpy()))[clear].mean() > 0.995


def test_classes_that_were_not_shown_are_never_answered(make, batch):
    model = Model(
        encoder=FlatPixels(),
        decoder=NearestMean(),
        objective=Classify(),
        spec={"image_size": [8, 8], "channels": 1, "classes": 10},
    )
    model.configure_model()
    codes = model.encoder(batch)
    assert (model.decoder(codes) == 0).all(), "nothing is known yet"
    few = batch["label"] < 3
    model.decoder.learn(codes.vector[few], batch["label"][few], None)
    logits = model.decoder(codes)
    assert logits.isfinite().all() and set(logits.argmax(1).tolist()) <= {0, 1, 2}


def test_too_small_a_memory_is_refused_with_both_numbers(digits, trainer):
    model = Model(encoder=FlatPixels(), decoder=NearestNeighbours(memory=100), objective=Classify())
    with pytest.raises(ConfigError, match="memory is 100, but there are 256 training samples: raise it"):
        trainer().fit(model, datamodule=digits())


@pytest.mark.parametrize("given", [{"k": 0}, {"memory": 0}])
def test_impossible_arguments_are_refused(given):
    with pytest.raises(ConfigError, match="needs k and memory of at least 1"):
        NearestNeighbours(**given)
