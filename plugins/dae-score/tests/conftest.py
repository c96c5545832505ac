"""A linear Gaussian world in which everything is known, and a small model of two modes."""

import pytest
import torch
from lightning.pytorch import Trainer

from quire.model import Model
from quire.schedule import Constant
from quire_dae_score.modules import ScoreMlp
from quire_dae_score.objective import Denoising
from quire_dae_score.toy import ToyDensity

S = torch.tensor([[2.0, 0.8], [0.8, 1.0]], dtype=torch.double)
"""The covariance of the spec's oracles, section 7."""
SIGMA = 0.5


def smooth_score(x):
    """∇log p_σ of N(0, S) with noise of σ = 0.5, exact."""
    spread = S + SIGMA**2 * torch.eye(2, dtype=torch.double)
    return (-(x.double() @ torch.linalg.inv(spread))).to(x.dtype)


@pytest.fixture
def trainer(tmp_path):
    """A quiet trainer that writes under the test's folder."""

    def made(**given):
        plain = {
            "accelerator": "cpu",
            "logger": False,
            "default_root_dir": str(tmp_path),
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        }
        return Trainer(**{**plain, **given})

    return made


@pytest.fixture
def make():
    """A built model of vectors of width 2 unless said otherwise."""

    def made(objective=None, spec=None, seed=0, rate=2e-3, **parts):
        torch.manual_seed(seed)
        parts.setdefault("encoder", ScoreMlp(widths=[16]))
        model = Model(
            objective=objective or Denoising(sigma=0.4, field="vector"),
            optimizer=lambda groups: torch.optim.Adam(groups, lr=rate),
            schedule=Constant(),
            spec=spec or {"width": 2},
            **parts,
        )
        model.configure_model()
        return model

    return made


@pytest.fixture
def toy():
    """Few points of two modes."""

    def made(**given):
        return ToyDensity(**{"samples": 1024, "batch_size": 64, **given})

    return made
