"""Sites: what is read is what the model computes; what is changed is changed; nothing is left behind."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from tests.activations.subjects import quire_model, subject, tokens, transformers_model
from tests.language.hf_toys import adapter
from torch import nn

from quire.errors import ConfigError
from quire.roles.sites.reading import _Enough
from quire.roles.sites.subject import Subject, fingerprint_of

KINDS = ("gpt2", "llama", "qwen2", "quire")


def hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_a_block_of_gpt2_is_the_next_hidden_state_to_the_bit():  # oracle 8
    made = subject("gpt2")
    batch = tokens()
    states = made.root(batch["tokens"], output_hidden_states=True).hidden_states
    found = made.sites.read(batch, ["blocks.0.resid", "blocks.1.resid_pre", "blocks.0.resid_pre", "blocks.1.resid"])
    assert torch.equal(found.values["blocks.0.resid"], states[1])
    assert torch.equal(found.values["blocks.1.resid_pre"], states[1])
    assert torch.equal(found.values["blocks.0.resid_pre"], states[0])
    normed = made.root.transformer.ln_f(found.values["blocks.1.resid"])  # the last hidden state has the final norm
    assert torch.equal(normed, states[2])


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_a_block_add_up(kind):
    made = subject(kind)
    names = [f"blocks.1.{k}" for k in ("resid_pre", "attn_out", "mlp_out", "resid")]
    pre, attention, feed, after = (made.sites.read(tokens(), names).values[n] for n in names)
    assert torch.allclose(pre + attention + feed, after, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "bloom"])
def test_the_heads_and_the_bias_add_up_to_the_attention_output(kind):  # attn-sae and sae-circuits: hook test
    made = subject(kind)
    found = made.sites.read(tokens(), ["blocks.1.heads", "blocks.1.attn_out", "blocks.1.z"])
    heads, out = found.values["blocks.1.heads"], found.values["blocks.1.attn_out"]
    place = made.sites.place("blocks.1.z")
    assert heads.shape == (3, 9, 4, 32) and place.heads == 4
    bias = getattr(place.module, "bias", None)
    summed = heads.sum(2) + (0 if bias is None else bias)
    assert torch.allclose(summed, out, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_patterns_and_values_make_z(kind):  # direct feature attribution rests on it; grouped queries included
    made = subject(kind)
    found = made.sites.read(tokens(), ["blocks.1.z"], pattern=True)
    pattern, value = found.patterns["blocks.1.z"], found.attended["blocks.1.z"]
    assert value.shape == (3, 9, 2 if kind in ("llama", "qwen2") else 4, 8)
    repeated = value.repeat_interleave(4 // value.shape[2], 2)
    z = torch.einsum("bhts,bshd->bthd", pattern, repeated).flatten(2)
    assert torch.allclose(z, found.values["blocks.1.z"], atol=1e-5)
    assert torch.allclose(pattern.sum(-1), torch.ones(()), atol=1e-6)
    assert not pattern.triu(1).any()


@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt_neo", "gemma2", "falcon"])
def test_plain_attention_gives_its_pattern_too(kind):
    more = {} if kind in ("llama", "bloom") else OTHERS[kind]
    made = Subject(other(kind, more), kind)
    if kind == "llama":
        made.root.set_attn_implementation("eager")
        expected = made.root(tokens()["tokens"], output_attentions=True).attentions[1]
        found = made.sites.read(tokens(), ["blocks.1.z"], pattern=True)
        assert torch.allclose(found.patterns["blocks.1.z"], expected, atol=1e-6)
    found = made.sites.read(tokens(), ["blocks.1.z"], pattern=True)
    value = found.attended["blocks.1.z"]
    repeated = value.repeat_interleave(4 // value.shape[2], 2)
    z = torch.einsum("bhts,bshd->bthd", found.patterns["blocks.1.z"], repeated).flatten(2)
    assert torch.allclose(z, found.values["blocks.1.z"], atol=1e-5)


WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
OTHERS = {
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gemma2": {**WIDE, "head_dim": 8, "num_key_value_heads": 2},
    "falcon": WIDE,
    "gpt_neox": WIDE,
    "opt": {**WIDE, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "mixtral": {**WIDE, "num_key_value_heads": 2, "num_local_experts": 2},
}


def other(kind, more):
    """A model of another family; eager where it has nothing else."""
    from quire.contracts import Spec, build
    from quire.roles.language.hf import HFCausal

    ids = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
    if not more:
        return transformers_model(kind)
    torch.manual_seed(0)
    how = "eager" if kind in ("gemma2", "gpt_neo") else "sdpa"
    made = HFCausal(config={"model_type": kind, **more, **ids}, attn_implementation=how)
    build(made, Spec())
    return made.eval()


@pytest.mark.parametrize("kind", ["gpt_neox", "opt", "gptj", "mixtral", "gemma2"])
def test_other_families_have_the_same_sites(kind):
    made = Subject(other(kind, OTHERS[kind]), kind)
    names = [f"blocks.1.{k}" for k in ("resid_pre", "attn_out", "mlp_out", "resid", "heads")]
    found = made.sites.read(tokens(), names, grad=True).values
    pre, attention, feed, after, heads = (found[n] for n in names)
    bias = getattr(made.sites.place("blocks.1.heads").module, "bias", None)
    assert torch.allclose(heads.sum(2) + (0 if bias is None else bias), attention, atol=1e-5)
    if kind != "gemma2":  # it norms both parts before it adds them
        assert torch.allclose(pre + attention + feed, after, atol=1e-5)


def test_the_decoder_of_an_encoder_decoder_is_the_subject():
    made = Subject(adapter("bart"), "bart")
    batch = {**tokens(), "source": tokens(seed=3)["tokens"]}
    found = made.sites.read(batch, ["blocks.1.heads", "blocks.1.attn_out"], grad=True)
    assert found.values["blocks.1.heads"].shape == (3, 9, 4, 32)
    assert made.sites.anatomy.path == "model.decoder.layers"


def test_layers_above_the_last_site_do_not_run():
    made = subject("llama")
    ran = []
    for i, block in enumerate(made.root.model.layers):
        block.register_forward_pre_hook(lambda m, a, i=i: ran.append(i))
    made.sites.read(tokens(), ["blocks.1.z", "blocks.0.resid"])
    assert ran == [0, 1]
    made.sites.read(tokens(), ["blocks.0.resid"], output=True)
    assert ran == [0, 1, 0, 1, 2]


def test_several_sites_from_one_pass_are_those_of_single_passes():
    made = subject("llama")
    names = ["blocks.2.mlp_out", "blocks.0.z", "blocks.1.resid", "model.layers.1.mlp.up_proj", "model.norm:in"]
    together = made.sites.read(tokens(), names).values
    for name in names:
        assert torch.equal(together[name], made.sites.read(tokens(), [name]).values[name])


def test_the_subject_is_untouched_also_by_an_error():  # oracle 8
    made = subject("gpt2")
    before = fingerprint_of(made.root)
    made.sites.read(tokens(), ["blocks.0.resid", "blocks.1.z"], grad=True)
    assert fingerprint_of(made.root) == before
    assert all(p.grad is None and not p.requires_grad for p in made.root.parameters())
    with pytest.raises(RuntimeError, match="on purpose"):
        _raise_within(made)
    with pytest.raises(IndexError):
        made.sites.read({"tokens": torch.full((1, 4), 999)}, ["blocks.1.resid"])
    assert hooks(made.root) == 0


def _raise_within(made):
    with made.sites.replace("blocks.0.resid", lambda x: x), made.sites.steer("blocks.1.z", torch.ones(32)):
        raise RuntimeError("on purpose")


def test_gradients_are_those_of_the_summed_loss_of_later_targets():
    made = subject("gpt2")
    batch = {**tokens(2, 7), "mask": torch.ones(2, 7, dtype=torch.bool)}
    batch["mask"][1, 5:] = False
    g = made.sites.read(batch, ["blocks.0.resid"], grad=True).grads["blocks.0.resid"]
    assert (g[0, -1] == 0).all() and (g[1, 4:] == 0).all()  # no target after it
    assert (g[0, :-1].abs().sum(-1) > 0).all()
    x = made.sites.read(batch, ["blocks.0.resid"]).values["blocks.0.resid"]
    made.part.double()

    def loss(value):
        with torch.no_grad(), made.sites.replace("blocks.0.resid", lambda _: value):
            return made.loss(made.aligned(batch)[0])[0]

    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = 1e-5
    slope = (loss(x.double() + step * direction) - loss(x.double() - step * direction)) / (2 * step)
    assert slope == pytest.approx(float((g.double() * direction).sum()), rel=1e-3)


def test_gradients_at_several_sites_are_those_of_single_passes():
    made = subject("llama")
    names = ["blocks.0.resid", "blocks.1.z", "blocks.2.mlp_out"]
    together = made.sites.read(tokens(), names, grad=True).grads
    for name in names:
        assert torch.allclose(together[name], made.sites.read(tokens(), [name], grad=True).grads[name], atol=1e-6)
    heads = made.sites.read(tokens(), ["blocks.1.heads"], grad=True).grads["blocks.1.heads"]
    out = made.sites.read(tokens(), ["blocks.1.attn_out"], grad=True).grads["blocks.1.attn_out"]
    assert torch.allclose(heads, out[:, :, None].expand_as(heads), atol=1e-6)


def test_gradients_work_in_inference_mode_and_reading_gives_normal_tensors():
    made = subject("gpt2")
    with torch.inference_mode():
        batch = {k: v.clone() for k, v in tokens().items()}
        found = made.sites.read(batch, ["blocks.0.resid"], grad=True)
        plain = made.sites.read(batch, ["blocks.0.resid"]).values["blocks.0.resid"]
    assert not found.grads["blocks.0.resid"].is_inference() and not plain.is_inference()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_side_and_neighbours_change_nothing(kind):
    made = subject(kind)
    row = tokens(1, 5)["tokens"]
    other = tokens(1, 9, seed=1)["tokens"]
    alone = made.sites.read({"tokens": row}, ["blocks.1.z"], pattern=True, output=True)
    for side in ("right", "left"):
        filler = torch.zeros(1, 4, dtype=torch.long)
        both = torch.cat([torch.cat([row, filler] if side == "right" else [filler, row], 1), other])
        mask = torch.ones(2, 9, dtype=torch.bool)
        own = slice(0, 5) if side == "right" else slice(4, 9)
        mask[0] = False
        mask[0, own] = True
        found = made.sites.read({"tokens": both, "mask": mask}, ["blocks.1.z"], pattern=True, output=True)
        assert torch.allclose(found.values["blocks.1.z"][0, own], alone.values["blocks.1.z"][0], atol=1e-5)
        pattern = found.patterns["blocks.1.z"][0][:, own, own]
        assert torch.allclose(pattern, alone.patterns["blocks.1.z"][0], atol=1e-5)
        assert torch.allclose(found.output[0, own], alone.output[0], atol=1e-4)


# ---- changing
class Identity:
    def __call__(self, what):
        return what["activation"] if isinstance(what, dict) else what


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", ["blocks.1.resid", "blocks.1.z", "blocks.0.mlp_out", "blocks.1.attn_out"])
def test_a_splice_of_the_identity_changes_no_logit(kind, site):  # oracle 3: exactly 0
    made = subject(kind)
    clean = made.logits(tokens())
    for keep in (True, False):
        with made.sites.splice(site, Identity(), Identity(), keep_error=keep):
            assert torch.equal(made.logits(tokens()), clean)


def test_a_bad_dictionary_with_its_error_kept_changes_nothing_until_a_code_is_edited():
    made = subject("gpt2")
    clean = made.logits(tokens())
    down = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))

    def encoder(batch):
        return batch["activation"] @ down

    def decoder(codes):
        return codes @ down.T

    with made.sites.splice("blocks.0.resid", encoder, decoder):
        assert torch.equal(made.logits(tokens()), clean)
    with made.sites.splice("blocks.0.resid", encoder, decoder, edit=lambda c: c):
        assert torch.allclose(made.logits(tokens()), clean, atol=1e-5)
    with made.sites.splice("blocks.0.resid", encoder, decoder, edit=lambda c: c + 1):
        edited = made.logits(tokens())
    with made.sites.steer("blocks.0.resid", down.sum(1)):
        assert torch.allclose(made.logits(tokens()), edited, atol=1e-3)
    with made.sites.splice("blocks.0.resid", encoder, decoder, keep_error=False):
        assert not torch.allclose(made.logits(tokens()), clean, atol=1e-2)
    since = torch.tensor([4, 9, 0])
    with made.sites.splice("blocks.0.resid", encoder, decoder, edit=lambda c: c + 1, since=since):
        late = made.logits(tokens())
    assert torch.allclose(late[0, :4], clean[0, :4], atol=1e-5) and torch.allclose(late[1], clean[1], atol=1e-5)
    assert torch.allclose(late[2], edited[2], atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "quire"])
def test_steering_adds_once_per_new_position_under_a_cache(kind):  # fast-sae: alpha 0 is plain, each position once
    from quire.roles.language.loop import Greedy

    made = subject(kind)
    model = SimpleNamespace(decoder=made.steps, encoder=None, tokenizer=None, generator=None)
    batch = {"tokens": tokens(2, 5)["tokens"]}
    sampler = Greedy(max_new_tokens=6)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    plain = sampler(model, batch).tokens
    with made.sites.steer("blocks.0.resid", direction, 0.0):
        assert sampler(model, batch).tokens == plain
    with made.sites.steer("blocks.0.resid", direction, 3.0):
        steered = sampler(model, batch).tokens
        row = batch["tokens"][0].tolist()
        for token in steered[0][0]:  # without a cache: the whole row anew, steered at every position
            again = int(made.logits({"tokens": torch.tensor([row])})[0, -1].argmax())
            assert again == token
            row.append(token)
    assert steered != plain


@pytest.mark.parametrize("kind", ["gpt2", "llama", "quire"])
def test_ablating_heads_takes_out_what_they_add(kind):
    made = subject(kind)
    sites = made.sites
    added = sites.read(tokens(), ["blocks.1.heads", "blocks.1.attn_out"]).values
    heads, out = added["blocks.1.heads"], added["blocks.1.attn_out"]
    for site in ("blocks.1.z", "blocks.1.heads"):
        with sites.ablate(site, [0, 2], "zero"):
            left = sites.read(tokens(), ["blocks.1.attn_out"]).values["blocks.1.attn_out"]
        if site.endswith("z"):  # at heads the output is changed behind the module that the site reads
            assert torch.allclose(left, out - heads[:, :, [0, 2]].sum(2), atol=1e-5)
    with sites.ablate("blocks.1.z", [0, 2], "zero"):
        by_z = made.logits(tokens())
    with sites.ablate("blocks.1.heads", [0, 2], "zero"):
        assert torch.allclose(made.logits(tokens()), by_z, atol=1e-4)
    z = sites.read(tokens(seed=5), ["blocks.1.z"]).values["blocks.1.z"]
    with sites.ablate("blocks.1.z", range(4), "patch", z):
        patched = sites.read(tokens(), ["blocks.1.attn_out"]).values["blocks.1.attn_out"]
    other = sites.read(tokens(seed=5), ["blocks.1.attn_out"]).values["blocks.1.attn_out"]
    assert torch.allclose(patched, other, atol=1e-5)
    mean = sites.read(tokens(), ["blocks.1.z"]).values["blocks.1.z"].unflatten(-1, (4, 8)).mean((0, 1))
    with sites.ablate("blocks.1.z", [1], "mean"):
        own = made.logits(tokens())
    with sites.ablate("blocks.1.z", [1], "mean", mean):
        assert torch.allclose(made.logits(tokens()), own, atol=1e-5)


# ---- bad input
def test_an_unknown_site_names_the_nearest_and_how_to_list_them():
    made = subject("gpt2")
    with pytest.raises(ConfigError, match=r"no site 'blocks.1.rezid'.*blocks.1.resid.*--list-sites"):
        made.sites.read(tokens(), ["blocks.1.rezid"])
    with pytest.raises(ConfigError, match="blocks 0 to 1"):
        made.sites.read(tokens(), ["blocks.7.resid"])
    with pytest.raises(ConfigError, match=r"nearest: transformer.h.0.mlp"):
        made.sites.read(tokens(), ["transformer.h.0.mpl"])
    assert "blocks.1.heads" in made.sites.names() and len(made.sites.names()) == 12


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda s: s.steer("blocks.0.resid", torch.ones(5)), "direction has width 5; site blocks.0.resid has width 32"),
        (lambda s: s.splice("blocks.0.resid", lambda b: b["activation"], lambda c: c[:, :7]), "gives width 7"),
        (lambda s: s.replace("blocks.0.resid", lambda x: x[:, 1:]), r"its replacement is \[3, 8, 32\]"),
        (lambda s: s.ablate("blocks.0.z", [4]), "head 4 is outside site blocks.0.z, which has 4 heads"),
        (lambda s: s.ablate("blocks.0.resid", [0]), "has no heads: ablate at blocks.0.z"),
        (lambda s: s.ablate("blocks.0.z", [0], "median"), "mode zero, mean or patch"),
        (lambda s: s.ablate("blocks.0.z", [0], "patch"), "needs values"),
    ],
)
def test_wrong_widths_heads_and_modes_are_refused(run, said):
    made = subject("gpt2")
    with pytest.raises(ConfigError, match=said), run(made.sites):
        made.logits(tokens())
    assert hooks(made.root) == 0


def test_train_mode_is_switched_to_eval_and_said(caplog):
    module = transformers_model("gpt2").module.train()
    with caplog.at_level(logging.WARNING):
        from quire.datasets.activations.opening import open_subject

        made = open_subject(module)
    assert "train mode" in caplog.text and "dropouts" in caplog.text
    assert not any(m.training for m in made.root.modules())
    made.root.train()
    first = made.sites.read(tokens(), ["blocks.0.resid"]).values["blocks.0.resid"]
    assert torch.equal(first, made.sites.read(tokens(), ["blocks.0.resid"]).values["blocks.0.resid"])


def test_any_module_is_a_subject_by_its_paths():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(60, 8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 60))
    made = Subject(module.eval(), "mine")
    found = made.sites.read(tokens(), ["1", "3:in"], grad=True)
    assert torch.equal(found.values["3:in"], module[2](found.values["1"]))
    with pytest.raises(ConfigError, match="no site"):
        made.sites.read(tokens(), ["blocks.0.z"])


def test_a_site_that_the_pass_never_reaches_is_named():
    made = Subject(quire_model(), "mine")
    made.root.spare = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="site spare was not reached"):
        made.sites.read(tokens(), ["spare"])
    assert not issubclass(_Enough, ConfigError)


@pytest.mark.parametrize("masked", [False, True])
def test_an_image_and_a_masked_text_encoder_can_be_read(masked):
    from quire.contracts import Spec, build
    from quire.roles.tokens.text import TextEncoder
    from quire.roles.tokens.vit import ViTEncoder

    if masked:
        encoder = TextEncoder(width=16, depth=2, heads=2)
        build(encoder, Spec({"vocab_size": 60, "length": 9}))
        batch = {**tokens(), "mask": torch.arange(9)[None] < torch.tensor([[9], [4], [6]])}
    else:
        encoder = ViTEncoder(patch=4, width=16, depth=2, heads=2)
        build(encoder, Spec({"image_size": 8, "channels": 3}))
        batch = {"image": torch.rand(3, 3, 8, 8)}
    made = Subject(encoder.eval(), "mine")
    found = made.sites.read(batch, ["blocks.1.resid", "blocks.0.resid", "blocks.1.z", "blocks.0.heads"], pattern=True)
    assert torch.allclose(found.values["blocks.1.resid"], encoder.features(batch).joined(), atol=1e-6)
    assert torch.allclose(found.values["blocks.0.resid"], encoder.features(batch, 1).joined(), atol=1e-6)
    value = found.attended["blocks.1.z"]
    z = torch.einsum("bhts,bshd->bthd", found.patterns["blocks.1.z"], value).flatten(2)
    assert torch.allclose(z, found.values["blocks.1.z"], atol=1e-5)
    if masked:
        with pytest.raises(ConfigError, match="can't be changed"), made.sites.replace("blocks.0.resid", lambda x: x):
            made.run(batch)
    else:
        plain = encoder(batch).values
        with made.sites.replace("blocks.0.resid", lambda x: x.flip(0)):
            assert torch.equal(encoder(batch).values, plain.flip(0))
