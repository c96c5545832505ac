"""From a name to a subject: the embedded one, checkpoints, transformers folders, components."""

from __future__ import annotations

import pytest
import torch
from tests.activations.subjects import quire_model, transformers_model

import quire
from quire.contracts import Spec
from quire.datasets.activations import tiny
from quire.datasets.activations.module import Activations
from quire.datasets.activations.opening import open_subject
from quire.errors import ConfigError
from quire.model import Model

SIZES = Spec({"vocab_size": 60, "length": 64, "eos": 3, "bos": 1})


def test_the_tiny_subject_is_built_once_and_the_same_from_any_run(tmp_path, monkeypatch):
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "a"))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    folder = tiny.tiny_subject("tiny-30s", steps=3)
    assert torch.equal(torch.get_rng_state(), before)  # a first run draws what a later one draws
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert tiny.tiny_subject("tiny-30s", steps=3) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    monkeypatch.setattr(tiny, "STEPS", {"tiny": 3, "tiny-30s": 3})
    subject = open_subject("tiny-30s")
    assert subject.context == 64 and subject.tokenizer.vocab_size == 260 and subject.root.config.model_type == "gpt2"
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "b"))
    torch.manual_seed(6)
    assert open_subject("tiny-30s").fingerprint == subject.fingerprint
    data = Activations("tiny-30s", "blocks.1.resid", "stdlib:docs", batch_size=64, buffer=512, train_samples=8)
    assert data.spec["width"] == 64 and data.source.length == 64
    batch = next(iter(data.train_dataloader()))
    assert batch["activation"].shape == (64, 64) and data.tokenizer.decode(batch["token"].tolist())
    with pytest.raises(ConfigError, match="embedded ones are tiny, tiny-30s"):
        tiny.tiny_subject("tiny-5s")


def test_a_checkpoint_is_a_subject_with_its_tokenizer_and_its_own_loss(tmp_path):
    from quire.datasets.images import Digits
    from quire.recipe import instantiate
    from quire.roles.language.text import Bytes

    model = Model(decoder=quire_model(), objective=instantiate({"class_path": "NextToken"}), spec=SIZES)
    model.configure_model()
    model.refer_tokenizer(Bytes())
    quire.export(model, tmp_path / "lm")
    subject = open_subject(str(tmp_path / "lm"))
    assert subject.steps is not None and subject.tokenizer.vocab_size == 260
    assert subject.fingerprint == open_subject(quire_model()).fingerprint
    part = instantiate({"class_path": "Pretrained", "init_args": {"path": str(tmp_path / "lm"), "part": "decoder"}})
    again = open_subject(part)
    assert again.name == str(tmp_path / "lm") and again.tokenizer.vocab_size == 260

    trained = {"class_path": "ViTEncoder", "init_args": {"patch": 4, "width": 16, "depth": 1, "heads": 2}}
    picture = Model(
        encoder=instantiate(trained), objective=instantiate({"class_path": "Classify"}), spec=dict(Digits().spec)
    )
    picture.configure_model()
    quire.export(picture, tmp_path / "vit")
    data = Activations(str(tmp_path / "vit"), "blocks.0.resid", Digits(), batch_size=32, buffer=64, with_grad=True)
    batch = next(iter(data.train_dataloader()))
    assert batch["grad"].abs().sum() > 0 and "token" not in batch


def test_a_transformers_folder_is_a_subject(tmp_path):
    model = transformers_model()
    model.module.save_pretrained(tmp_path)
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 4, "<e>": 3}, "<e>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>").save_pretrained(tmp_path)
    subject = open_subject(str(tmp_path))
    assert subject.fingerprint == open_subject(model).fingerprint and subject.tokenizer.eos == 3
    with pytest.raises(ConfigError, match="nothing to load at"):
        open_subject(str(tmp_path / "elsewhere"))


def test_what_is_no_subject_is_said():
    from quire.roles.language.models import CausalLM
    from quire.roles.probes.classify import Classify

    with pytest.raises(ConfigError, match="data.subject is Classify: give a language model or an encoder"):
        open_subject(Classify())
    with pytest.raises(ConfigError, match="has no weights and no data"):
        open_subject(CausalLM())
    with pytest.raises(ConfigError, match="data.subject is a int"):
        open_subject(3)
