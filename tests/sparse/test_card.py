"""The metric card: every number against its oracle, merged over any split, and what stands in for a missing one."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from tests.activations.subjects import Ids, feed, subject
from tests.sparse.toys import model_of, rows

from quire.errors import ConfigError, DataError
from quire.roles.sparse.card import Card, CardRow, histogram, matched, matched_text, measure, pareto, spread
from quire.roles.sparse.codes import SparseCodes
from quire.roles.sparse.splices import recovered
from quire.roles.sparse.sums import Sums

D = 12


def identity(batch):
    """Codes that hold the activation itself, negative parts too: the decoder below gives it back bit for bit."""
    return SparseCodes(batch["activation"], None, batch["activation"].shape[-1])


def same(codes):
    return codes.values


def batches_of(*sizes, seed=0, scale=None):
    source = torch.Generator().manual_seed(seed)
    made = [torch.randn(n, D, generator=source) + i for i, n in enumerate(sizes)]
    return [{"activation": x * (scale[i] if scale else 1)} for i, x in enumerate(made)]


def noisy(codes):
    return codes.values * 0.5


# ---- merged sums
@pytest.mark.parametrize("sizes", [(60,), (7, 53), (1, 1, 58), (20, 20, 20)])
def test_oracle_4_fvu_is_the_same_for_any_split_of_the_set(sizes):
    whole = torch.cat([b["activation"] for b in batches_of(10, 20, 30)])
    made = measure(identity, noisy, [{"activation": part} for part in whole.split(list(sizes))], splice=False)
    wide = whole.double()
    expected = float((0.5 * wide).square().sum() / (wide - wide.mean(0)).square().sum())
    assert made["fvu"] == pytest.approx(expected, rel=1e-6)
    assert made["nmse"] == pytest.approx(0.25, rel=1e-6)


def test_oracle_4_a_mean_of_batch_ratios_is_another_number():
    batches = batches_of(10, 20, 30, scale=[1, 5, 0.1])
    ratios = [
        float((0.5 * x).square().sum() / (x - x.mean(0)).square().sum()) for x in (b["activation"] for b in batches)
    ]
    merged = measure(identity, noisy, batches, splice=False)["fvu"]
    assert abs(sum(ratios) / len(ratios) - merged) > 1e-3


def test_sums_added_in_any_order_are_the_sums_of_the_whole():
    parts = [b["activation"].double() for b in batches_of(5, 1, 9)]

    def of(x):
        return Sums.of(x, x * 0.7, (x > 0).sum(1), (x > 0).sum(0), {"a": x[:, 0]})

    whole, joined = of(torch.cat(parts)), of(parts[2]) + (of(parts[0]) + of(parts[1]))
    assert joined.numbers() == pytest.approx(whole.numbers(), rel=1e-12)
    assert torch.allclose(joined.mean, whole.mean) and torch.equal(joined.fired, whole.fired)


def test_tokens_is_a_limit_to_the_token():
    made = measure(identity, same, batches_of(10, 20, 30), tokens=17, splice=False)
    assert made.about["tokens"] == 17


# ---- single numbers
def test_oracle_3_a_perfect_rebuild_explains_all_and_the_mean_nothing():
    batches = batches_of(10, 20)
    mean = torch.cat([b["activation"] for b in batches]).mean(0)
    perfect = measure(identity, same, batches, splice=False)
    assert perfect["fvu"] == 0 and perfect["cosine"] == pytest.approx(1) and perfect["norm_ratio"] == pytest.approx(1)
    flat = measure(identity, lambda codes: mean.expand_as(codes.values), batches, splice=False)
    assert flat["fvu"] == pytest.approx(1, rel=1e-6)


def test_a_kept_zero_is_not_active_and_never_fires():
    values, indices = torch.tensor([[2.0, 0.0], [1.0, 3.0]]), torch.tensor([[0, 1], [0, 2]])
    batch = {"activation": torch.ones(2, D)}
    made = measure(lambda b: SparseCodes(values, indices, 4), lambda c: torch.ones(2, D), [batch], splice=False)
    assert (made["l0"], made["l0_min"], made["l0_max"]) == (1.5, 1, 2)
    assert made["dead"] == 0.5  # latents 1 and 3
    assert made.about["dead_window"] == "2 evaluated tokens"


def test_the_histogram_counts_every_live_latent_once():
    counts, edges = histogram(torch.tensor([0, 1, 10, 100, 1000]), 1000)
    assert sum(counts) == 4 and len(edges) == len(counts) + 1
    assert counts[0] == 1 and counts[-1] == 1 and edges[-1] == pytest.approx(0)


def test_dead_in_training_has_its_own_window():
    model = model_of(dtype=torch.float32)
    model.decoder.tokens_since_fired[:24] = 100
    made = measure(model.encoder, model.decoder, [{"activation": rows(dtype=torch.float32)}], splice=False, window=50)
    assert made["dead_training"] == 0.25 and made.about["dead_training_window"] == "50 training tokens"
    assert 0 < made["coherence"] <= 1


def test_measuring_changes_neither_mode_nor_weights_nor_counters():
    model = model_of(dtype=torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    measure(model.encoder, model.decoder, [{"activation": rows(dtype=torch.float32)}], splice=False)
    assert model.encoder.training and model.decoder.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---- splices
def test_oracle_3_splicing_the_identity_costs_exactly_nothing():
    made = measure(identity, same, feed(), tokens=120)
    assert made["delta_ce"] == 0 and made["kl"] == 0
    assert made["recovered_zero"] == 1 and made["recovered_mean"] == 1
    assert made["ce_zero"] != made["ce_clean"]


def test_oracle_3_a_rebuild_of_zero_recovers_nothing_of_zero_ablation():
    made = measure(identity, lambda codes: torch.zeros_like(codes.values), feed(), tokens=120)
    assert made["recovered_zero"] == 0
    assert made["kl"] > 0


def test_splices_of_padded_rows_leave_special_tokens_alone_where_they_were_not_fed():
    data = feed(source=Ids(ragged=True), drop_special=True)
    made = measure(identity, same, data, tokens=60)
    assert made["delta_ce"] == 0
    fed = measure(identity, lambda codes: codes.values + 5, feed(source=Ids(ragged=True)), tokens=60)
    left = measure(identity, lambda codes: codes.values + 5, data, tokens=60)
    assert fed["ce_clean"] == left["ce_clean"] and fed["ce_spliced"] != left["ce_spliced"]


@pytest.mark.parametrize("site", ["blocks.0.heads", "blocks.1.z", "blocks.0.attn_out"])
def test_splices_work_at_every_kind_of_site(site):
    made = measure(identity, same, feed(site=site), tokens=60)
    assert made["delta_ce"] == 0 and not math.isnan(made["ce_mean"])


def test_a_transcoder_is_spliced_at_its_target():
    data = feed(site="blocks.0.resid", target_site="blocks.0.mlp_out")
    made = measure(identity, lambda codes: torch.zeros_like(codes.values), data, tokens=60)
    assert made["recovered_zero"] == 0


def test_an_encoder_that_reads_gradients_gets_them_in_the_splice_too():
    seen = []

    def encoder(batch):
        seen.append("grad" in batch)
        return identity(batch)

    assert measure(encoder, same, feed(with_grad=True), tokens=60)["delta_ce"] == 0
    assert seen and all(seen)


def test_plain_batches_with_tokens_are_spliced_at_a_given_site():
    model = subject()
    batch = {"tokens": torch.randint(4, 60, (4, 9), generator=torch.Generator().manual_seed(0))}
    batch["mask"] = torch.ones(4, 9, dtype=torch.bool)
    read = model.sites.read(batch, ["blocks.0.resid"]).values["blocks.0.resid"]
    made = measure(identity, same, [{**batch, "activation": read}], model, "blocks.0.resid")
    assert made["delta_ce"] == 0 and made.about["targets"] == 32 and made.about["tokens"] == 36


def test_a_gap_too_small_to_divide_by_gives_nan_and_a_warning():
    with pytest.warns(UserWarning, match=r"CE recovered against zero ablation is NaN"):
        assert math.isnan(recovered(1.0, 1.0, 1.0005, "zero"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert recovered(1.0, 1.5, 2.0, "zero") == 0.5


def test_without_a_subject_the_card_says_why_there_are_no_splices():
    made = measure(identity, same, batches_of(10))
    assert "ce_spliced" not in made.numbers and any("no subject" in note for note in made.notes)


# ---- rows of others
def test_a_function_adds_a_mean_over_all_tokens_and_a_card_row_what_it_likes():
    class Largest(CardRow):
        def card_begin(self):
            self.most = 0.0

        def card_see(self, seen):
            self.most = max(self.most, float(seen.x.abs().max()))
            return {"first": seen.codes.dense()[:, 0]}

        def card_rows(self):
            return {"largest": self.most}

    batches = batches_of(10, 30)
    whole = torch.cat([b["activation"] for b in batches])
    made = measure(identity, same, batches, splice=False, extra=[Largest(), lambda seen: {"norm": seen.x.norm(dim=1)}])
    assert made["first"] == pytest.approx(float(whole[:, 0].mean()), rel=1e-5)
    assert made["norm"] == pytest.approx(float(whole.norm(dim=1).mean()), rel=1e-6)
    assert made["largest"] == pytest.approx(float(whole.abs().max()))
    assert {"first", "norm", "largest"} <= {row.name for row in made.rows()}


# ---- files, sweeps
def card(arm, seed, l0, value):
    return Card({"l0": l0, "delta_ce": value, "fvu": value / 2, "dead": 0.0}, name=arm, seed=seed)


def test_a_card_reads_back_as_it_was_written(tmp_path):
    made = measure(identity, same, batches_of(10, 30), name="topk", seed=3)
    made.numbers["none"] = math.nan
    back = Card.read(made.write(tmp_path))
    assert math.isnan(back.numbers.pop("none")) and math.isnan(made.numbers.pop("none"))
    assert back == made
    text = (tmp_path / "card.md").read_text()
    assert "baseline: that mean" in text and "| none | - |" in text
    assert (tmp_path / "card.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad.json is no card"):
        Card.read(tmp_path / "bad.json")


def test_matched_l0_interpolates_in_log_l0_within_each_seed_and_never_beyond_a_sweep():
    cards = [card("a", s, l0, 8 - math.log2(l0) + s) for s in (0, 1) for l0 in (2, 8, 32)]
    cards += [card("b", s, l0, 10 - math.log2(l0)) for s in (0, 1) for l0 in (4, 16)]
    rows = matched(cards)
    assert [(r["l0"], r["arm"]) for r in rows] == [(8, "a"), (8, "b")]  # 2 and 32 lie outside b's range
    assert rows[0]["delta_ce"].mean == pytest.approx(5.5) and rows[0]["delta_ce"].sd == pytest.approx(0.5**0.5)
    assert rows[1]["delta_ce"].mean == pytest.approx(7) and rows[1]["delta_ce"].seeds == 2
    assert "| 8 | a | 5.5 ± 0.71 |" in matched_text(rows)
    with pytest.raises(ConfigError, match=r"no L0 in common \(a 2 to 32, c 50 to 50\)"):
        matched([*cards[:3], card("c", 0, 50, 1)])


def test_pareto_draws_a_png_and_spread_is_over_seeds(tmp_path):
    cards = [card(a, s, l0, 1 / l0 + 0.01 * s) for a in "ab" for s in (0, 1, 2) for l0 in (4, 8)]
    assert pareto(cards, tmp_path / "p" / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    assert spread(cards, "l0")["a"].mean == 6
    with pytest.raises(ConfigError, match=r"no card has the number"):
        pareto([Card({"l0": 1.0})], tmp_path / "q.png")


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match=r"tokens must be at least 1, got 0"):
        measure(identity, same, batches_of(3), tokens=0)
    with pytest.raises(ConfigError, match=r"needs the batch field 'activation'; the feed gives image"):
        measure(identity, same, [{"image": torch.zeros(1)}])
    with pytest.raises(DataError, match=r"no token to evaluate"):
        measure(identity, same, [])


def test_a_subject_that_is_no_language_model_is_judged_by_its_own_loss():
    from quire import Model
    from quire.datasets.activations.module import Activations
    from quire.datasets.images import Digits
    from quire.roles.probes.classify import Classify
    from quire.roles.sites.subject import Subject
    from quire.roles.tokens.vit import ViTEncoder

    source = Digits(batch_size=8)
    torch.manual_seed(0)
    model = Model(ViTEncoder(patch=4, width=16, depth=2, heads=2), objective=Classify(), spec=source.spec)
    model.configure_model()
    data = Activations(site="blocks.0.mlp_out", source=source, contexts=8, batch_size=16)
    data._subject = Subject(model.encoder.eval(), "digits", None, model)
    made = measure(identity, same, data, tokens=16)
    assert made["delta_ce"] == 0 and math.isnan(made["kl"]) and made["ce_zero"] != made["ce_clean"]
