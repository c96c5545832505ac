"""A bank trains each member as it would train alone."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tests.sparse.toys import D, F

from quire import ConfigError, Model
from quire.data import Fields
from quire.datasets.planted import PlantedFeatures
from quire.roles.sparse.bank import BankMember, DictionaryBank
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.formats.files import write
from quire.roles.sparse.objective import SparseReconstruction
from quire.roles.sparse.selectors import BatchTopK, ReLU, TopK
from quire.schedule import Constant

ADAM: Any = {"class_path": "torch.optim.Adam", "init_args": {"lr": 3e-3}}


class TwoSites(PlantedFeatures):
    """Planted rows, and the same turned round, as a feed with two sites gives them."""

    def split(self, name: str) -> Fields:
        rows = super().split(name).tensors["activation"]
        return Fields(**{"activation": rows, "activation@a": rows, "activation@b": rows.flip(1)})

    def sizes(self) -> dict[str, Any]:
        return {"width": self.width, "site": "a", "sites": ["a", "b"], "widths": [self.width, self.width]}


def parts(kind: str) -> tuple[SparseEncoder, SparseDecoder, SparseReconstruction]:
    given: dict[str, Any] = {"norm": "global_rms"} if kind == "batch" else {}
    selector = {"top": lambda: TopK(3), "batch": lambda: BatchTopK(4), "relu": ReLU}[kind]()
    loss = SparseReconstruction(l1=0.1 if kind == "relu" else 0.0, dead_after=100)
    return SparseEncoder(F, selector, **given), SparseDecoder(), loss


def fit(model: Model, data: PlantedFeatures) -> Model:
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_steps=6, accelerator="cpu", enable_model_summary=False, limit_val_batches=0, **options)
    trainer.fit(model, datamodule=data)
    return model.eval()


def alone(kind: str, seed: int, data: PlantedFeatures) -> Model:
    pl.seed_everything(seed, verbose=False)
    model = Model(*parts(kind), optimizer=ADAM, schedule=Constant())
    model.seed = 0
    return fit(model, data)


def data() -> TwoSites:
    return TwoSites(width=D, features=24, samples=512, batch_size=64)


MEMBERS = [("top", 0, None), ("batch", 1, None), ("relu", 2, None), ("top", 0, "b")]


@pytest.fixture(scope="module")
def bank() -> Model:
    pl.seed_everything(0, verbose=False)
    members = [
        BankMember(encoder, decoder, loss, site=site, seed=seed)
        for kind, seed, site in MEMBERS
        for encoder, decoder, loss in [parts(kind)]
    ]
    return fit(Model(objective=DictionaryBank(members), optimizer=ADAM, schedule=Constant()), data())


@pytest.mark.parametrize("number", range(3))
def test_a_member_trains_as_it_would_alone(bank: Model, number: int) -> None:
    kind, seed, _ = MEMBERS[number]
    wanted, found = alone(kind, seed, data()).state_dict(), bank.objective.member(number).state_dict()
    assert set(wanted) == set(found)
    for name in wanted:
        assert torch.allclose(wanted[name], found[name], atol=1e-6), name


def test_a_member_reads_its_own_site(bank: Model) -> None:
    first, other = bank.objective.member(0), bank.objective.member(3)
    assert (first.encoder.W_enc - other.encoder.W_enc).abs().max().item() > 1e-3
    assert other.spec["site"] == "b"


def test_parameters_have_a_leading_axis_of_members(bank: Model) -> None:
    shapes = {n: tuple(p.shape) for n, p in bank.named_parameters()}
    assert shapes == {
        "objective.encoder_W_enc": (4, F, D),
        "objective.encoder_b_enc": (4, F),
        "objective.encoder_b_dec": (4, D),
        "objective.decoder_W_dec": (4, F, D),
    }
    norms = bank.objective.decoder_W_dec.detach().norm(dim=-1)
    assert torch.allclose(norms, torch.ones(4, F), atol=1e-6)


def test_a_member_can_be_written_for_others(bank: Model, tmp_path: Any) -> None:
    assert (write(bank.objective.member(0), tmp_path) / "cfg.json").exists()


def test_members_must_agree_in_size_and_have_their_site() -> None:
    def built(*members: BankMember) -> None:
        Model(objective=DictionaryBank(list(members)), spec=dict(data().spec)).configure_model()

    with pytest.raises(ConfigError, match="members of a DictionaryBank must have the same sizes; encoder.W_enc"):
        built(BankMember(SparseEncoder(8, ReLU())), BankMember(SparseEncoder(9, ReLU())))
    with pytest.raises(ConfigError, match="BankMember.site is 'c'; the data has a, b: add it to data.site"):
        built(BankMember(SparseEncoder(8, ReLU()), site="c"))
    with pytest.raises(ConfigError, match="at least one member"):
        DictionaryBank([])
