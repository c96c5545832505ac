"""The feed: every real token once, paired with what belongs to it, from any subject."""

from __future__ import annotations

import pytest
import torch
from tests.activations.subjects import Ids, feed, quire_model, transformers_model

from quire.data import DataModule, Fields
from quire.datasets.activations.forwards import rows_of
from quire.datasets.activations.module import Activations
from quire.datasets.activations.rows import Instances, Rows
from quire.errors import ConfigError, DataError


def taken(loader):
    """All batches of one epoch, joined."""
    batches = list(loader)
    return {k: torch.cat([b[k] for b in batches]) for k in batches[0]}


def keys(rows):
    return rows["instance"] * 1000 + rows["position"]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("drop", [False, True])
def test_every_real_token_is_fed_once_with_what_belongs_to_it(ragged, drop):
    data = feed(source=Ids(ragged=ragged), drop_special=drop, with_grad=True)
    tensors = data.source.dataset("train").tensors
    real = tensors["mask"] & (~tensors["special"] if drop else True)
    loader = data.train_dataloader()
    rows = taken(loader)
    total = int(real.sum())
    assert len(rows["token"]) == total // 16 * 16 == 16 * len(loader)
    assert len(keys(rows).unique()) == len(rows["token"])
    assert real[rows["instance"], rows["position"]].all()
    assert torch.equal(rows["token"], tensors["tokens"][rows["instance"], rows["position"]])
    assert torch.equal(rows["special"], tensors["special"][rows["instance"], rows["position"]])
    assert torch.equal(rows["label"], tensors["label"][rows["instance"]])
    sites = data.subject.sites
    for i in (0, 7, 23):
        length = int(tensors["mask"][i].sum())
        one = sites.read({"tokens": tensors["tokens"][i : i + 1, :length]}, ["blocks.0.resid"], grad=True)
        mine = rows["instance"] == i
        at = rows["position"][mine]
        assert torch.allclose(rows["activation"][mine], one.values["blocks.0.resid"][0, at], atol=1e-5)
        assert torch.allclose(rows["grad"][mine], one.grads["blocks.0.resid"][0, at], atol=1e-4)


def test_evaluation_rows_come_in_order_and_all_of_them():
    data = feed(source=Ids(ragged=True))
    loader = data.val_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) and all(len(b["token"]) == 16 for b in batches[:-1])
    rows = taken(loader)
    assert len(rows["token"]) == int(data.source.dataset("val").tensors["mask"].sum())
    assert torch.equal(keys(rows).sort().values, keys(rows).sort().values.unique())


def test_one_forward_feeds_several_sites():
    sites = ["blocks.0.resid", "blocks.1.z", "transformer.h.1.mlp.c_fc"]
    subject = transformers_model()
    data = feed(subject=subject, site=sites, with_grad=True)
    rows = taken(data.train_dataloader())
    assert data.spec["widths"] == [32, 32, 128] and "states" not in rows
    for site in sites:
        alone = taken(feed(subject=subject, site=site, with_grad=True).train_dataloader())
        assert torch.equal(rows[f"activation@{site}"], alone["activation"])
        assert torch.allclose(rows[f"grad@{site}"], alone["grad"], atol=1e-5)
    even = taken(feed(subject=subject, site=sites[:2]).train_dataloader())
    assert even["states"].shape[1:] == (2, 32)
    assert torch.equal(even["states"][:, 0], even["activation"])


def test_heads_are_rows_and_a_transcoder_has_its_target():
    data = feed(site="blocks.1.heads", batch_size=16, buffer=256)
    rows = taken(data.train_dataloader())
    assert data.spec["heads"] == 4 and data.spec["head_width"] == 8 and data.spec["width"] == 32
    assert len(rows["head"]) == 40 * 12 * 4 // 16 * 16
    assert len((keys(rows) * 4 + rows["head"]).unique()) == len(rows["head"])
    one = data.subject.sites.read({"tokens": data.source.dataset("train").tensors["tokens"][:1]}, ["blocks.1.heads"])
    mine = rows["instance"] == 0
    got = one.values["blocks.1.heads"][0, rows["position"][mine], rows["head"][mine]]
    assert torch.allclose(rows["activation"][mine], got, atol=1e-5)
    pair = feed(site="blocks.0.resid_pre", target_site="blocks.0.resid")
    rows = taken(pair.train_dataloader())
    assert pair.spec["target_width"] == 32 and rows["target"].shape == rows["activation"].shape
    with pytest.raises(ConfigError, match="read it alone"):
        feed(site=["blocks.1.heads", "blocks.0.resid"]).train_dataloader()


def test_an_instance_does_not_see_its_neighbours():  # fast-sae's invariance oracle
    class Chat(Activations):
        def rows(self, name):
            source = torch.Generator().manual_seed(4)
            ids = [
                torch.randint(4, 60, (int(n),), generator=source) for n in torch.randint(1, 12, (30,), generator=source)
            ]
            special = [torch.arange(len(t)) == 0 for t in ids]
            return Rows(Instances(ids, special), self.contexts, self.drop_special, None, self.seed)

    some = {
        "subject": transformers_model("llama"),
        "source": Ids(),
        "site": "blocks.1.z",
        "buffer": 64,
        "batch_size": 1,
    }
    many = taken(Chat(**some, contexts=7).train_dataloader())
    single = taken(Chat(**some, contexts=1).train_dataloader())
    lengths = Chat(**some).rows("train").data.lengths
    assert len(many["token"]) == int(lengths.sum()) and int(many["special"].sum()) == 30
    a, b = keys(many).argsort(), keys(single).argsort()
    assert torch.equal(keys(many)[a], keys(single)[b])
    assert torch.allclose(many["activation"][a], single["activation"][b], atol=1e-5)
    no_special = taken(Chat(**some, contexts=7, drop_special=True).train_dataloader())
    assert len(no_special["token"]) == int(lengths.sum()) - 30


def test_rows_of_about_one_length_run_together():
    lengths = torch.randint(1, 60, (400,), generator=torch.Generator().manual_seed(0))
    rows = Rows(Instances([torch.ones(int(n), dtype=torch.long) for n in lengths]), 8, False, None, 0)
    plan = rows.plan(0, True)
    wide = sum(int(rows.lengths[part].max()) * len(part) for part in plan)
    assert wide < 1.15 * int(lengths.sum())  # hardly any padding
    assert sorted(i for part in plan for i in part) == list(range(400))
    assert plan != rows.plan(1, True) and plan == rows.plan(0, True)
    assert rows.batch(plan[0])["tokens"].shape[1] == int(rows.lengths[plan[0]].max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_kept_in_half_precision_are_served_in_fp32(dtype):
    rows = taken(feed(dtype=dtype).train_dataloader())
    whole = taken(feed().train_dataloader())
    assert rows["activation"].dtype == torch.float32 and rows["token"].dtype == torch.int64
    assert torch.allclose(rows["activation"], whole["activation"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "quire"])
def test_analysis_gives_whole_samples_with_patterns(kind):
    subject = quire_model() if kind == "quire" else transformers_model(kind)
    data = feed(subject=subject, site="blocks.1.z", source=Ids(ragged=True), analysis=True, batch_size=5)
    batch = next(iter(data.predict_dataloader()))
    assert {"activation", "mask", "tokens", "index", "pattern", "value", "special", "position"} <= set(batch)
    size, length = batch["tokens"].shape
    assert batch["activation"].shape == (size, length, 32) and batch["pattern"].shape == (size, 4, length, length)
    value = batch["value"].repeat_interleave(4 // batch["value"].shape[2], 2)
    z = torch.einsum("bhts,bshd->bthd", batch["pattern"], value).flatten(2)
    assert torch.allclose(z[batch["mask"]], batch["activation"][batch["mask"]], atol=1e-5)
    graded = feed(subject=subject, site="blocks.1.z", source=data.source, analysis=True, batch_size=5, with_grad=True)
    again = next(iter(graded.predict_dataloader()))
    assert torch.allclose(again["pattern"], batch["pattern"]) and again["grad"].shape == again["activation"].shape
    assert (again["grad"].abs().sum(-1) > 0)[:, 0].any()
    flat = dict(rows_of(batch))
    assert len(flat["activation"]) == len(flat["instance"]) == int(batch["mask"].sum())
    loader = data.train_dataloader()
    assert len(list(loader)) == len(loader) == 8
    loader.load_state_dict({"seen": 5})
    assert len(list(loader)) == 3


def test_a_frozen_image_encoder_is_a_subject():
    from quire.contracts import Spec, build
    from quire.datasets.images import Digits
    from quire.roles.tokens.vit import ViTEncoder

    encoder = ViTEncoder(patch=2, width=16, depth=2, heads=2, class_token=True)
    data = Digits()
    build(encoder, Spec(data.spec))
    made = Activations(encoder, "blocks.0.mlp_out", data, batch_size=64, buffer=256, contexts=16, train_samples=32)
    rows = taken(made.train_dataloader())
    assert made.spec["width"] == 16 and len(rows["activation"]) == 32 * 17 // 64 * 64
    assert (rows["special"] == (rows["position"] == 0)).all()  # the class token
    assert "token" not in rows and "label" in rows
    fewer = Activations(
        encoder, "blocks.0.mlp_out", data, batch_size=64, buffer=256, train_samples=32, drop_special=True
    )
    assert len(taken(fewer.train_dataloader())["activation"]) == 32 * 16


def test_text_comes_in_the_subjects_own_tokens():
    from quire.roles.language.models import CausalLM

    data = feed(subject=CausalLM(width=16, depth=2, heads=2), source="stdlib:docs", length=16, train_samples=8)
    assert data.source.length == 16 and data.tokenizer.vocab_size == 260 and data.spec["vocab_size"] == 260
    assert len(taken(data.train_dataloader())["token"]) == 128


# ---- bad input
class Silent(Ids):
    def split(self, name):
        made = super().split(name)
        return Fields(**{**made.tensors, "special": torch.ones_like(made.tensors["special"])})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"site": "blocks.5.resid"}, "no site 'blocks.5.resid'.*nearest"),
        ({"site": []}, "one or more different sites"),
        ({"site": ["blocks.0.resid"] * 2}, "different sites"),
        ({"dtype": "int8"}, "data.dtype is float32, bfloat16, float16"),
        ({"buffer": 8}, "data.buffer is 8 rows, less than a batch of 16"),
        ({"keep": 1.0}, "data.keep"),
        ({"contexts": 0}, "data.contexts"),
        ({"num_workers": 2}, "data.num_workers must be 0"),
        ({"batch_size": 10_000, "buffer": 20_000}, "data.batch_size is 10000, but Activations has 480 training rows"),
        ({"folder": "nowhere"}, "nowhere/train is not a harvested folder"),
        ({"subject": None, "folder": "x", "analysis": True}, "data.subject is null"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(arguments, said):
    with pytest.raises(ConfigError, match=said):
        feed(**arguments).train_dataloader()


def test_nothing_left_to_feed_is_said():
    with pytest.raises(DataError, match=r"train split has nothing to feed.*drop_special: false"):
        feed(source=Silent(), drop_special=True).train_dataloader()


def test_the_subjects_tokenizer_is_not_fitted_to_another_text(tmp_path):
    from quire.roles.language.text import BPE
    from quire.roles.sites.subject import Subject

    tokenizer = BPE(280)
    tokenizer.fit(["the cat sat on the mat with the hat "] * 50)
    before = tokenizer.fingerprint
    (tmp_path / "other.txt").write_text("zxzxzx qvqvqv kjkjkj\n" * 400)
    named = Subject(transformers_model(vocab_size=300), "small", tokenizer)
    data = feed(subject=named, source=str(tmp_path), length=16)
    data.train_dataloader()
    assert data.tokenizer.fingerprint == before


def test_a_text_shorter_than_one_row_is_said(tmp_path):
    from quire.roles.language.models import CausalLM

    (tmp_path / "short.txt").write_text("too short\n" * 3)
    with pytest.raises(ConfigError, match="fewer than one row of 64"):
        feed(subject=CausalLM(width=16, depth=1, heads=2), source=str(tmp_path), length=64).train_dataloader()
    with pytest.raises(ConfigError, match="takes 64 tokens: lower it"):
        feed(subject=Named(), source=str(tmp_path), length=100).train_dataloader()


def Named():
    from quire.roles.language.text import Bytes
    from quire.roles.sites.subject import Subject

    return Subject(transformers_model(), "small", Bytes())


def test_broken_activations_name_site_row_and_position():
    model = transformers_model()

    def spoil(module, args, out):
        if out.shape[0] > 2:  # not in the pass that asks for the width
            out[2, 5] = float("nan")
        return out

    model.module.transformer.h[0].mlp.register_forward_hook(spoil)
    data = feed(subject=model, site=["blocks.0.resid", "blocks.1.resid"])
    plan = data.rows("train").plan(0, True)
    with pytest.raises(DataError, match=rf"activations of site blocks.0.resid .* row {plan[0][2]} .*position 5"):
        next(iter(data.train_dataloader()))


def test_a_subject_without_a_loss_gives_no_gradients():
    from quire.contracts import Spec, build
    from quire.datasets.images import Digits
    from quire.roles.tokens.vit import ViTEncoder

    encoder = ViTEncoder(patch=4, width=16, depth=1, heads=2)
    build(encoder, Spec(Digits().spec))
    made = Activations(encoder, "blocks.0.resid", Digits(), batch_size=8, buffer=64, with_grad=True)
    with pytest.raises(ConfigError, match="with_grad needs a loss"):
        next(iter(made.train_dataloader()))


def test_an_instance_without_tokens_is_refused():
    with pytest.raises(DataError, match="instance 1 has no token"):
        Instances([torch.ones(2), torch.ones(0)])
    assert issubclass(Ids, DataModule)
