"""The gradients that the feed gives: what they are, and what taking them leaves alone."""

import pytest
import torch
from gsae_toys import D, feed

from quire.contracts import Spec, build
from quire.roles.language.models import CausalLM
from quire.roles.sites.subject import Subject, fingerprint_of
from quire_gsae.scores import effect

SITE = "blocks.0.resid"


def subject(dtype=torch.float32):
    torch.manual_seed(0)
    part = CausalLM(width=D, depth=2, heads=2, rope=False)
    build(part, Spec({"vocab_size": 40, "length": 16, "eos": 3, "bos": 1}))
    with torch.no_grad():
        for parameter in part.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return Subject(part.to(dtype).eval(), "toy")


def tokens(seed=0):
    return {"tokens": torch.randint(4, 40, (3, 10), generator=torch.Generator().manual_seed(seed))}


def test_oracle_the_last_position_of_a_row_has_no_gradient():
    """No target stands behind it; a shifted label would show here."""
    grad = subject().sites.read(tokens(), [SITE], grad=True).grads[SITE]
    assert bool((grad[:, -1] == 0).all()) and bool((grad[:, :-1].abs().sum(-1) > 0).all())


def test_oracle_a_gradient_depends_on_later_targets_only():
    model, batch = subject(), tokens()
    mask = torch.ones(3, 10, dtype=torch.bool)
    first = model.sites.read({**batch, "mask": mask}, [SITE], grad=True).grads[SITE]
    with torch.no_grad():  # other losses before position 4, the same from there on
        logits, wanted = model.logits(batch), batch["tokens"]
    assert logits.shape[:2] == wanted.shape
    x = model.sites.read(batch, [SITE]).values[SITE]
    held = x.clone().requires_grad_(True)
    with model.sites.replace(SITE, lambda _: held):
        out = model.run(batch).float()
    late = torch.nn.functional.cross_entropy(out[:, 4:-1].flatten(0, 1), wanted[:, 5:].flatten(), reduction="sum")
    (grad,) = torch.autograd.grad(late, held)
    assert torch.allclose(grad[:, 4:], first[:, 4:], atol=1e-5) and not torch.allclose(grad[:, :4], first[:, :4])


def test_oracle_finite_differences_agree_with_the_effect():
    """(L(x - h z d) - L(x)) / (-h z (d.g)) -> 1 in fp64, |error| <= 1e-3 at h = 1e-4."""
    model, batch = subject(torch.float64), tokens()
    found = model.sites.read(batch, [SITE], grad=True)
    row = torch.nn.functional.normalize(
        torch.randn(1, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )
    z, h = 1.7, 1e-4
    for place in ((0, 2), (1, 5), (2, 0)):
        g = found.grads[SITE][place]

        def less(x, place=place):
            x = x.clone()
            x[place] -= h * z * row[0]
            return x

        with torch.no_grad(), model.sites.replace(SITE, less):
            changed = model.loss(batch)[0]
        ratio = float((changed - found.loss) / (-h * z * (row[0] @ g)))
        assert ratio == pytest.approx(1, abs=1e-3)
        assert float(effect(g[None], row)) == pytest.approx(abs(float(row[0] @ g)))


def test_oracle_the_subject_stays_as_it_was():
    data = feed()
    studied = data.studied()
    before = fingerprint_of(studied.root)
    batch = next(iter(data.train_dataloader()))
    assert batch["grad"].shape == batch["activation"].shape
    assert fingerprint_of(studied.root) == before and not studied.root.training
    assert all(p.grad is None and not p.requires_grad for p in studied.root.parameters())


def test_rows_keep_their_own_gradient_through_the_shuffle():
    data = feed(batch_size=32, buffer=64)
    found = {}
    for batch in data.train_dataloader():
        for i, p, x, g in zip(
            batch["instance"].tolist(), batch["position"].tolist(), batch["activation"], batch["grad"]
        ):
            found[i, p] = (x, g)
    rows = data.rows("train").batch(list(range(4)))
    read = data.studied().sites.read(rows, [SITE], grad=True)
    pairs = [(i, p) for i in range(4) for p in range(16) if (i, p) in found]
    assert len(pairs) > 40
    for i, p in pairs:
        x, g = found[i, p]
        assert torch.allclose(x, read.values[SITE][i, p], atol=1e-5)
        assert torch.allclose(g, read.grads[SITE][i, p], atol=1e-4)
