"""Runs under a Trainer: the corpus from the data, what is kept, what is forgotten."""

import pytest
import torch
from lightning.pytorch import Trainer

from quire.datasets.text import TextTokens
from quire.errors import ConfigError
from quire.model import Model
from quire.roles.language.loop import Greedy, Speculative
from quire.roles.language.metrics import AcceptanceStats
from quire.roles.language.models import CausalLM
from quire_aded.callbacks import SaveTrigrams
from quire_aded.drafter import TrigramTree
from quire_aded.store import Trigrams


def predicted(sampler, callbacks=(), times=1):
    torch.manual_seed(0)
    metric = AcceptanceStats()
    model = Model(decoder=CausalLM(width=32, depth=1, heads=2), sampler=sampler, metrics=[metric])
    data = TextTokens(source="stdlib:docs", length=32, batch_size=4)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(limit_predict_batches=3, callbacks=list(callbacks), enable_model_summary=False, **quiet)
    for _ in range(times):
        found = trainer.predict(model, datamodule=data)
    return model, data, found, metric


def test_the_training_split_is_the_corpus_and_ids_equal_greedy(tmp_path):
    file = tmp_path / "m.safetensors"
    _, data, found, metric = predicted(
        Speculative(TrigramTree(nodes=8), max_new_tokens=8), [SaveTrigrams(str(file), every_n_batches=1)]
    )
    want = predicted(Greedy(8))[2]
    assert [f.tokens for f in found] == [f.tokens for f in want]
    store = Trigrams.load(file)
    assert store.fingerprint == data.tokenizer.fingerprint and store.vocab_size == 260 and len(store) > 1000
    assert sum(f.stats.steps for f in found) == int(metric.steps)
    assert list(metric.curve()) == list(range(12))
    assert float(metric.compute()) == pytest.approx(metric.total.accepted / metric.total.steps)
    again = predicted(Speculative(TrigramTree(corpus=str(file), nodes=8), max_new_tokens=8))[2]
    assert [f.tokens for f in again] == [f.tokens for f in want]


def test_oracle_9_a_run_learns_over_its_batches_and_the_next_one_starts_anew():
    run = predicted(Speculative(TrigramTree(corpus=None), max_new_tokens=8), times=1)
    twice = predicted(Speculative(TrigramTree(corpus=None), max_new_tokens=8), times=2)
    assert run[0].sampler.drafter.store.changed == twice[0].sampler.drafter.store.changed
    assert [f.stats for f in run[2]] == [f.stats for f in twice[2]]
    shared = predicted(Speculative(TrigramTree(corpus=None, scope="shared"), max_new_tokens=8), times=2)
    assert max(map(lambda r: max(r.values()), shared[0].sampler.drafter.store.changed.values())) >= max(
        map(lambda r: max(r.values()), run[0].sampler.drafter.store.changed.values())
    )
    assert shared[0].sampler.drafter.store.changed != run[0].sampler.drafter.store.changed


def test_saving_without_the_drafter_or_to_another_ending_is_refused():
    with pytest.raises(ConfigError, match="needs model.sampler with a TrigramTree"):
        predicted(Greedy(2), [SaveTrigrams()])
    with pytest.raises(ConfigError, match=r"must end in .safetensors"):
        SaveTrigrams("m.pkl")
    with pytest.raises(ConfigError, match="at least 0"):
        SaveTrigrams(every_n_batches=-1)
