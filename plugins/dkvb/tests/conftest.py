"""Small bottlenecks with keys, without a run."""

import pytest
import torch
from lightning.pytorch import Trainer

from quire.datasets.images import Digits
from quire.model import Model
from quire.roles.latent.plain import FlatPixels
from quire.roles.probes.classify import Classify
from quire.schedule import Constant
from quire_dkvb.decoders import CodebookVote
from quire_dkvb.encoder import KeyValueBottleneck

SPEC = {"image_size": [8, 8], "channels": 1, "classes": 10}
SMALL = {"codebooks": 6, "keys": 16, "key_width": 4}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.3)


@pytest.fixture
def make():
    """A built model whose keys are heads of digits; ``given`` are the bottleneck's arguments, ``parts`` Model's."""

    def made(given=None, *, encoder=None, smoothing=0.0, spec=SPEC, ready=True, seed=0, **parts):
        torch.manual_seed(seed)
        bottleneck = KeyValueBottleneck(encoder or FlatPixels(), **{**SMALL, **(given or {})})
        parts.setdefault("decoder", CodebookVote())
        parts.setdefault("objective", Classify(label_smoothing=smoothing))
        model = Model(encoder=bottleneck, optimizer=sgd, schedule=Constant(), spec=spec, **parts)
        model.configure_model()
        if ready:
            with torch.no_grad():
                heads = bottleneck.project(bottleneck.read(images())[0].flatten(0, 1))
                bottleneck.initialised(heads[: bottleneck.count].transpose(0, 1))
        return model.train()

    return made


def images(count=64, first=0):
    """Digits as a batch, in order."""
    rows = Digits(split="stratified").dataset("train").__getitems__(list(range(first, first + count)))
    return {**rows, "index": torch.arange(first, first + count)}


@pytest.fixture
def batch():
    """Sixty-four digits."""
    return images()


@pytest.fixture
def digits():
    """Digits with few samples; arguments are Digits'."""

    def made(**given):
        return Digits(**{"split": "stratified", "batch_size": 64, "train_samples": 256, **given})

    return made


@pytest.fixture
def trainer(tmp_path):
    """A quiet trainer that writes under the test's folder."""

    def made(epochs=1, **given):
        return Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            default_root_dir=str(tmp_path),
            enable_progress_bar=False,
            enable_model_summary=False,
            **{"enable_checkpointing": False, "num_sanity_val_steps": 0, "limit_val_batches": 0, **given},
        )

    return made


@pytest.fixture
def some():
    """``images``: so many digits as a batch, from the first on."""
    return images
