"""A small model of digits, and a run of it."""

import pytest
import torch
from lightning.pytorch import Trainer

from quire.datasets.images import Digits
from quire.model import Model
from quire.roles.latent.mlp import MlpVectorDecoder, MlpVectorEncoder
from quire.schedule import Constant
from quire_prototypes.modules import PrototypeLayer
from quire_prototypes.objective import CaseBasedReasoning

SPEC = {"image_size": [8, 8], "channels": 1, "classes": 10}


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.002)


@pytest.fixture
def make():
    """A built model; ``layer`` and ``objective`` may be dicts of arguments, the rest is Model's."""

    def made(layer=None, objective=None, build=True, seed=0, spec=SPEC, **parts):
        torch.manual_seed(seed)
        parts.setdefault("encoder", MlpVectorEncoder(widths=[32], code=10))
        parts.setdefault("decoder", PrototypeLayer(**{"decoder": MlpVectorDecoder(widths=[32]), **(layer or {})}))
        if objective is None or isinstance(objective, dict):
            objective = CaseBasedReasoning(**(objective or {}))
        model = Model(objective=objective, optimizer=adam, schedule=Constant(), spec=spec, **parts)
        if build:
            model.configure_model()
        return model

    return made


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
            **{"enable_checkpointing": False, "num_sanity_val_steps": 0, **given},
        )

    return made


@pytest.fixture
def batch():
    """Eight digits as a batch."""
    data = Digits(split="stratified").dataset("train")
    rows = data.__getitems__(list(range(8)))
    return {**rows, "index": torch.arange(8)}
