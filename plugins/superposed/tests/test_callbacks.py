"""Runs under a Trainer: n-grams of the data, what is measured, what is shown."""

import pytest
import torch
from lightning.pytorch import Trainer

from quire.datasets.text import TextTokens
from quire.errors import ConfigError
from quire.model import Model
from quire.roles.language.loop import Greedy
from quire.roles.language.models import CausalLM
from quire.roles.language.next_token import NextToken
from quire_superposed.callbacks import PreviewDrafts
from quire_superposed.metrics import DraftSet
from quire_superposed.sampler import Superposed

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def parts(sampler):
    metric = DraftSet()
    model = Model(
        decoder=CausalLM(width=32, depth=1, heads=2), objective=NextToken(), sampler=sampler, metrics=[metric]
    )
    return model, TextTokens(source="stdlib:docs", length=32, batch_size=4, train_samples=64), metric


def test_n_grams_of_the_training_split_are_counted_once_and_drafts_are_measured():
    model, data, metric = parts(Superposed(prompt=8, max_new_tokens=6))
    trainer = Trainer(limit_predict_batches=2, **QUIET)
    found = trainer.predict(model, datamodule=data)
    assert len(found) == 2 and all(1 <= len(row) <= 3 for result in found for row in result.tokens)
    assert model.sampler.evidence.vocab_size == 260
    assert metric.table()["perplexity_mean"] > 1 and float(metric.compute()) >= 0


def test_other_data_are_counted_anew():
    model, data, _ = parts(Superposed(prompt=8, max_new_tokens=2))
    trainer = Trainer(limit_predict_batches=1, **QUIET)
    trainer.predict(model, datamodule=data)
    first = model.sampler.evidence
    trainer.predict(model, datamodule=data)
    assert model.sampler.evidence is first
    trainer.predict(model, datamodule=parts(None)[1])
    assert model.sampler.evidence is not first


def test_drafts_are_written_after_epochs_and_training_is_not_disturbed(tmp_path):
    weights = []
    for callbacks in ([PreviewDrafts(prompts=2, every_n_epochs=2)], []):
        torch.manual_seed(0)
        model, data, _ = parts(Superposed(ngrams=None, prompt=8, max_new_tokens=4))
        where = {"default_root_dir": str(tmp_path), "enable_checkpointing": False, "limit_val_batches": 0}
        Trainer(max_epochs=4, limit_train_batches=2, callbacks=callbacks, **QUIET, **where).fit(model, datamodule=data)
        weights.append(model.decoder.token.weight.detach().clone())
        assert model.training
    assert (weights[0] == weights[1]).all()
    files = sorted((tmp_path / "drafts").iterdir())
    assert [f.name for f in files] == ["epoch-0002.txt", "epoch-0004.txt"]
    lines = files[0].read_text().splitlines()
    assert len(lines) == 2 * (1 + 3) and not lines[0].startswith(" ")
    shown = [float(line.split()[0]) for line in lines[1:4]]
    assert shown == sorted(shown)


def test_another_sampler_or_silly_numbers_are_refused():
    model, data, _ = parts(Greedy(2))
    with pytest.raises(ConfigError, match="PreviewDrafts needs Superposed; model.sampler is Greedy"):
        Trainer(max_steps=1, callbacks=[PreviewDrafts()], enable_checkpointing=False, **QUIET).fit(
            model, datamodule=data
        )
    with pytest.raises(ConfigError, match="every_n_epochs >= 1"):
        PreviewDrafts(every_n_epochs=0)
