"""Steering: nothing at strength 0, every position once under a cache."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fast_toys import SITE, dialogues, feed, subject
from torch.nn.functional import normalize

from quire.contracts import Spec
from quire.errors import ConfigError
from quire.model import Model
from quire.roles.language.loop import Greedy
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.objective import SparseReconstruction
from quire.roles.sparse.selectors import TopK
from quire_fast_sae.steer import Steer


def dictionary(sampler, under=None):
    torch.manual_seed(1)
    spec = Spec({"width": 32, "site": SITE})
    model = Model(SparseEncoder(24, TopK(4)), SparseDecoder(), SparseReconstruction(), sampler, spec=spec)
    model.configure_model()
    made = SimpleNamespace(decoder=model.decoder, subject=under, spec=spec)
    return made, model


@pytest.fixture
def batch(tmp_path):
    data = feed(tmp_path, dialogues(60))
    return data.rows("test").batch([0, 1])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "quire"])
def test_strength_0_is_plain_greedy_text(batch, kind):  # oracle
    under = subject(kind)
    model, _ = dictionary(Steer(3, [0.0, 40.0], max_new_tokens=10), under)
    rows = Steer(3, [0.0, 40.0], max_new_tokens=10)(model, batch)
    alone = SimpleNamespace(decoder=under.steps, encoder=None, tokenizer=under.tokenizer)
    plain = Greedy(10)(alone, batch)
    assert [r["answers"][0]["tokens"] for r in rows] == [t[0] for t in plain.tokens]
    assert any(r["answers"][0]["tokens"] != r["answers"][1]["tokens"] for r in rows)
    assert [r["index"] for r in rows] == [0, 1] and all(a["text"] is not None for r in rows for a in r["answers"])


@pytest.mark.parametrize("alpha", [12.0, -12.0])
def test_every_position_is_steered_once_under_a_cache(batch, alpha):  # oracle
    under = subject()
    model, _ = dictionary(Steer(), under)
    rows = Steer(5, [alpha], max_new_tokens=8)(model, batch)
    direction = normalize(model.decoder.W_dec[5].detach(), dim=0)
    for i, row in enumerate(rows):
        ids = batch["tokens"][i, : batch["prompt_length"][i]].tolist()
        made = []
        while len(made) < 8 and (not made or made[-1] != 258):  # no cache: the whole text again for each token
            with under.sites.steer(SITE, direction, alpha):
                made.append(int(under.logits({"tokens": torch.tensor([ids + made])})[0, -1].argmax()))
        assert row["answers"][0]["tokens"] == [i for i in made if i != 258] or row["answers"][0]["tokens"] == made


def test_wrong_latents_strengths_and_subjects_are_refused(batch):
    with pytest.raises(ConfigError, match=r"Steer\.latent is 24, but the dictionary has 24 latents"):
        dictionary(Steer([2, 24]))
    with pytest.raises(ConfigError, match=r"Steer\.latent must be one or more numbers from 0"):
        Steer(-1)
    with pytest.raises(ConfigError, match=r"Steer\.alpha needs at least one strength"):
        Steer(0, [])
    model, _ = dictionary(Steer())
    with pytest.raises(ConfigError, match="Steer needs data with a language model as its subject; there is no subject"):
        Steer()(model, batch)
