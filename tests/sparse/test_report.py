"""The report page: what it shows is where latents fire; one file; a browser finds a latent by its number."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch
import yaml
from tests.activations.subjects import feed

from quire.__main__ import execute
from quire.contracts import Spec, build
from quire.datasets.activations.module import Activations
from quire.datasets.images import Digits
from quire.errors import ConfigError, DataError
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.report.command import which
from quire.roles.sparse.report.found import Context, Latent, Piece, Report
from quire.roles.sparse.report.gather import Wanted, choose, gather
from quire.roles.sparse.report.page import percent, render
from quire.roles.sparse.report.samples import around
from quire.roles.sparse.selectors import TopK
from quire.roles.tokens.vit import ViTEncoder

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def pair(width, latents=24, k=2):
    """A random dictionary."""
    torch.manual_seed(0)
    encoder, decoder = SparseEncoder(latents, TopK(k)), SparseDecoder()
    build(encoder, Spec(width=width))
    build(decoder, Spec(width=width, codes=encoder.sizes()))
    return encoder.eval(), decoder.eval()


def small(**more):
    """Text through a small language model with random weights."""
    given = Activations.tiny()["data"]["init_args"] | {"train_samples": None} | more
    from quire.roles.language.models import CausalLM

    return Activations(**{**given, "subject": CausalLM(width=16, depth=2, heads=2, rope=False)})


def reported(data, **wanted):
    return gather(
        *pair(data.sizes()["width"]), data, Wanted(**{"tokens": 400, "count": 6, "contexts": 3, **wanted}), "T"
    )


# ---- what is shown
def test_contexts_show_the_latent_at_its_strongest_with_the_values_that_it_has_there():
    data = small()
    encoder, _ = pair(16)
    report = gather(encoder, None, data, Wanted(tokens=400, count=6, contexts=3, width=8), "T")
    rows = data.rows("val")
    for latent in report.latents:
        peaks = [c.peak for c in latent.contexts]
        assert peaks == sorted(peaks, reverse=True) and peaks[0] == pytest.approx(latent.peak)
        assert len({c.where[0] for c in latent.contexts}) == len(latent.contexts)
        for context in latent.contexts:
            row, at = context.where
            batch = rows.batch([row])
            values = data.studied().sites.read(batch, data.sites).values[data.sites[0]][0]
            dense = encoder({"activation": values}).dense()[:, latent.number].detach()
            assert context.pieces[context.at].value == pytest.approx(float(dense[at]), rel=1e-4)
            low = at - context.at
            assert [p.value for p in context.pieces] == pytest.approx(
                dense[low : low + len(context.pieces)].tolist(), rel=1e-4
            )
            text = data.tokenizer.decode(batch["tokens"][0, low : low + len(context.pieces)].tolist())
            assert "".join(p.text for p in context.pieces) == text


def test_shares_and_histograms_count_every_firing():
    report = reported(small())
    for latent in report.latents:
        assert sum(latent.histogram) == latent.fired
        assert latent.share == pytest.approx(latent.fired / 512)  # whole forward passes are read


def test_logits_are_the_row_through_the_final_gain_and_the_unembedding():
    data = small(site="blocks.1.resid")
    encoder, decoder = pair(16)
    report = gather(encoder, decoder, data, Wanted(tokens=400, numbers=(3,), contexts=1), "T")
    model = data.studied().root
    with torch.no_grad():
        expected = model.head.weight @ (decoder.W_dec[3] * model.final.weight)
    expected = expected - expected.mean()
    assert report.latents[0].up[0][1] == pytest.approx(float(expected.max()), rel=1e-4)
    assert report.latents[0].down[0][1] == pytest.approx(float(expected.min()), rel=1e-4)


def test_heads_are_attributed_by_slices_at_z_and_by_firings_at_a_heads_site():
    z = reported(feed(site="blocks.1.z"), count=4)
    heads = reported(feed(site="blocks.1.heads"), count=4)
    assert "slice" in z.heads and "firings" in heads.heads
    for latent in [*z.latents, *heads.latents]:
        assert sum(latent.heads) == pytest.approx(1, abs=1e-5) and len(latent.heads) == 4


def test_an_image_encoders_tokens_are_shown_as_patches():
    vit = ViTEncoder(patch=4, width=16, depth=2, heads=2, positions="learned")
    data = Activations(subject=vit, site="blocks.0.resid", source=Digits(batch_size=8), contexts=8, batch_size=16)
    report = reported(data, tokens=200)
    context = report.latents[-1].contexts[0]
    assert context.picture.startswith("data:image/png;base64,") and context.grid == (2, 2)
    assert max(context.heat) == pytest.approx(context.peak, rel=1e-5)
    assert f'<image href="{context.picture}"' in render(report)


def test_chosen_latents_go_from_rare_to_frequent_and_leave_dead_ones_out():
    counts = torch.tensor([0, 5, 1, 9, 3, 0, 7])
    assert choose(counts, 3) == [1, 2, 3]  # the median, the rarest and the most frequent
    assert choose(counts, 100) == [1, 2, 3, 4, 6]


def test_a_context_is_as_wide_as_asked_and_holds_its_peak():
    texts = ["ab"] * 50
    low, high = around(texts, 25, 20)
    assert (low, high) == (20, 31)
    assert around(texts, 0, 20) == (0, 6) and around(["x" * 99], 0, 2) == (0, 1)


# ---- the page
def page_of(**more):
    context = Context(2.0, (5, 7), [Piece("<b>"), Piece("\n", 2.0), Piece(" &", 1.0)], 1)
    latent = Latent(17, 4, 0.02, 2.0, [1, 0, 3], [(" up", 0.5)], [("down", -0.25)], [0.75, 0.25], [context])
    return render(Report("A & B", {"site": "x"}, [0, 3], [-2.0, -1.0, 0.0], [latent], **more))


def test_text_cannot_break_the_page_and_line_ends_can_be_seen():
    page = page_of()
    assert "<b>" not in page.split("<main>")[1].split("<section")[1].replace("<b>2 %</b>", "").replace("<b>2</b>", "")
    assert "&lt;b&gt;" in page and "↵" in page and "&amp;" in page and "<title>A &amp; B</title>" in page


def test_shading_grows_with_the_activation():
    shades = [float(x) for x in re.findall(r'--a:([\d.]+)" title', page_of())]
    assert shades == [0.9, 0.51]


def test_the_page_needs_nothing_from_elsewhere():
    page = page_of()
    assert not re.search(r'(src|href)="(?!#|data:)', page)
    assert "@import" not in page and "url(" not in page and "http" not in page


@pytest.mark.parametrize(("share", "said"), [(0.5, "50 %"), (0.0123, "1.2 %"), (0.000149, "0.015 %"), (1, "100 %")])
def test_percent_has_two_digits(share, said):
    assert percent(share) == said


# ---- command
RUN = {
    "seed_everything": 1,
    "model": {
        "encoder": {
            "class_path": "SparseEncoder",
            "init_args": {"latents": 24, "selector": {"class_path": "TopK", "init_args": {"k": 2}}},
        },
        "decoder": "SparseDecoder",
        "objective": "SparseReconstruction",
    },
    "data": Activations.tiny()["data"],
    "trainer": {
        "max_steps": 2,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "callbacks": [{"class_path": "SparseCard", "init_args": {"tokens": 128}}],
    },
}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A trained run's page, by the command."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "small.yaml").write_text(yaml.safe_dump(RUN))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert execute(["fit", "-c", "small.yaml"]) == 0
        run = "runs/small/version_0"
        assert execute(["report", run, "--latents", "3,11,", "--tokens", "300", "--contexts", "2"]) == 0
        assert execute(["report", "runs/small", "--latents", "5", "--tokens", "300", "--out", "few.html"]) == 0
        assert execute(["report", run, "--latents", "99,"]) == 2
    return folder / run / "report.html"


def test_the_command_shows_the_asked_latents_and_the_runs_card(page):
    text = page.read_text()
    assert [int(n) for n in re.findall(r'<section id="latent-(\d+)"', text)] == [3, 11]
    assert "<dt>ΔCE</dt>" in text and "<dt>FVU</dt>" in text
    few = (page.parents[3] / "few.html").read_text()
    assert len(re.findall("<section", few)) == 5


def test_a_dictionary_in_another_projects_files_is_shown_too(page, tmp_path):
    from quire import load
    from quire.roles.sparse.formats.files import write

    write(load(page.parent / "checkpoints" / "last.ckpt"), tmp_path / "foreign", "saelens")
    assert execute(["report", str(tmp_path / "foreign"), "--latents", "2"]) == 2  # which data, it doesn't say
    (tmp_path / "foreign" / "config.yaml").write_text(yaml.safe_dump({"data": RUN["data"]}))
    assert execute(["report", str(tmp_path / "foreign"), "--latents", "11,", "--tokens", "300"]) == 0
    shown, own = (
        (f / "report.html").read_text().split('id="latent-11"')[1] for f in (tmp_path / "foreign", page.parent)
    )
    assert shown.split("<aside>")[0] == own.split("<aside>")[0]


def test_a_browser_opens_the_page_and_finds_a_latent_by_its_number(page, tmp_path):
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser to open the page in: none of {', '.join(BROWSERS)} is installed")
    calm = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--virtual-time-budget=2000"]

    def opened(where):
        shown = subprocess.run(
            [browser, *calm, "--dump-dom", page.as_uri() + where], capture_output=True, text=True, timeout=60
        )
        assert shown.returncode == 0, shown.stderr
        return shown.stdout

    found = opened("?latent=11")
    assert "<title>Latent 11 · " in found
    assert re.search(r'<li data-number="11"[^>]*class="here"', found)
    assert re.search(r'<li data-number="3"[^>]*style="display: none;"', found)
    assert "1 of 2" in found
    missing = opened("?latent=7")
    assert "latent 7 is not on this page" in missing and 'class="here"' not in missing


def test_bad_input_is_refused(tmp_path):
    assert which("40") == (40, []) and which("3,17,3") == (0, [3, 17])
    for wrong in ("0", "x", "", "-1,2"):
        with pytest.raises(ConfigError, match=r"--latents takes how many \(40\) or which"):
            which(wrong)
    with pytest.raises(ConfigError, match=r"latent 24 is outside 0\.\.23"):
        reported(small(), numbers=(24,))
    encoder, decoder = pair(16)
    with pytest.raises(ConfigError, match=r"Digits has none; use Activations"):
        gather(encoder, decoder, Digits(), Wanted(), "T")
    with torch.no_grad():
        encoder.b_enc.fill_(-1e9)
    with pytest.raises(DataError, match=r"no latent fired in 512 tokens of the val split"):
        gather(encoder, decoder, small(), Wanted(tokens=400), "T")
    assert execute(["report", str(tmp_path / "none")]) == 2
