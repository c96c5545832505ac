from __future__ import annotations

import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from quire import ConfigError, Model
from quire.__main__ import execute
from quire.datasets.algorithmic import Algorithmic
from quire.datasets.images import Digits
from quire.datasets.text import TextTokens
from quire.roles.language.bigram import BigramFloor, Bigrams, pairs_of, tuned
from quire.roles.language.models import CausalLM
from quire.roles.language.next_token import NextToken

ROOT = Path(__file__).resolve().parents[2]
PAIRS = torch.tensor([[0, 1], [0, 1], [0, 2], [1, 0]])


def test_probabilities_by_hand():
    """V=3, d=1/2. Each token ends one kind of pair, so p(w) = (1+1)/(3+3) = 1/3.

    p(1|0) = 1.5/3 + .5*2/3 * 1/3 = 11/18; p(2|0) = .5/3 + 1/9 = 5/18; p(0|0) = 1/9; p(0|1) = .5 + .5/3 = 2/3;
    2 was never followed by anything: 1/3.
    """
    asked = torch.tensor([[0, 1], [0, 2], [0, 0], [1, 0], [2, 0], [2, 2]])
    found = (-Bigrams(3, 0.5).fit(PAIRS).nats(asked)).exp()
    expected = torch.tensor([11 / 18, 5 / 18, 1 / 9, 2 / 3, 1 / 3, 1 / 3])
    torch.testing.assert_close(found, expected.double())


@pytest.mark.parametrize("discount", [0.1, 0.5, 0.95])
def test_every_row_of_the_table_sums_to_one(discount):
    generator = torch.Generator().manual_seed(0)
    model = Bigrams(7, discount).fit(torch.randint(6, (40, 2), generator=generator))
    asked = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    torch.testing.assert_close((-model.nats(asked)).exp().view(7, 7).sum(1), torch.ones(7).double())


def test_the_discount_suits_the_data():
    """Where nothing repeats, a seen pair says little: a large discount; where all repeats, a small one."""
    generator = torch.Generator().manual_seed(0)
    random = [torch.randint(50, (30, 2), generator=generator) for _ in range(30)]
    steady = [torch.stack([torch.arange(30), (torch.arange(30) + 1) % 30], 1) for _ in range(30)]
    assert tuned(random, 50).discount > 0.8
    assert tuned(steady, 50).discount == 0.1


def test_a_markov_chain_is_learnt_to_its_entropy():
    generator = torch.Generator().manual_seed(0)
    table = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    state, chain = 0, []
    for _ in range(6000):
        chain.append(state)
        state = int(torch.multinomial(table[state], 1, generator=generator))
    ids = torch.tensor(chain)
    pairs = torch.stack([ids[:-1], ids[1:]], 1)
    model = tuned(list(pairs[:5000].split(50)), 2)
    entropy = -(torch.tensor([2 / 3, 1 / 3]) * (table * table.log()).sum(1)).sum()  # 2/3, 1/3 is stationary
    assert abs(float(model.nats(pairs[5000:]).mean()) - float(entropy)) < 0.05


def test_pairs_stay_within_a_row_and_off_padding():
    rows = pairs_of(Algorithmic(task="copy", train_length=3, test_length=3, samples=32, causal=True).dataset("train"))
    assert len(rows) == 32
    for row in rows:
        assert (row[:, 1] != 0).all() and row[-1, 1] == 2 and (row[1:, 0] == row[:-1, 1]).all()


def test_it_scores_the_tokens_that_the_model_scores_and_prints_both():
    data = TextTokens("stdlib:docs", length=32, batch_size=8)
    model = Model(decoder=CausalLM(width=16, depth=1, heads=2), objective=NextToken(), spec=dict(data.spec))
    floor = BigramFloor()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(
        max_steps=2, limit_val_batches=3, accelerator="cpu", val_check_interval=2, callbacks=[floor], **quiet
    )
    trainer.fit(model, datamodule=data)
    found = trainer.callback_metrics
    batches = [data.dataset("val").__getitems__(list(range(8 * i, 8 * i + 8)))["tokens"] for i in range(3)]
    pairs = torch.cat([torch.stack([t[:, :-1], t[:, 1:]], -1).flatten(0, 1) for t in batches])
    assert math.isclose(float(found["val/bigram_loss"]), float(floor.model.nats(pairs).mean()), rel_tol=1e-5)
    row = floor.table["CausalLM"]
    assert math.isclose(row["nats per token"], float(found["val/loss"]), rel_tol=1e-5)
    assert math.isclose(row["bits per byte"] * math.log(2), row["nats per token"], rel_tol=0.02)  # bytes are the tokens
    assert set(floor.table) == {"CausalLM", "bigram model"}


def test_the_shipped_small_language_model_trains_and_prints_its_losses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.max_steps=3", "--trainer.val_check_interval=3", "--trainer.limit_val_batches=1"]
    assert execute(["fit", "-c", str(ROOT / "configs" / "lm-small.yaml"), *short]) == 0
    printed = capsys.readouterr().out
    assert all(f"held-out loss, {name}: " in printed for name in ("CausalLM", "bigram model"))
    assert printed.count("nats per token") == printed.count("bits per byte") == 2
    assert list((tmp_path / "runs" / "lm-small").rglob("*.ckpt"))


def test_data_without_tokens_are_refused():
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    trainer.datamodule = Digits()
    with pytest.raises(ConfigError, match="BigramFloor reads tokens of a known vocabulary; Digits has none"):
        BigramFloor().setup(trainer, None, "fit")
