"""The report as one HTML file: no script, style, font or picture from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from quire.roles.sparse.report.found import Context, Latent, Report
from quire.roles.sparse.result import MEANING, shown

BLANKS = {"\n": "↵", "\t": "→", "\r": "␍"}
ORDERS = {"number": "by number", "share": "most frequent", "rare": "rarest", "peak": "strongest"}
MAIN = {
    "l0": "L0",
    "fvu": "FVU",
    "cosine": "cosine",
    "norm_ratio": "norm ratio",
    "dead": "dead",
    "delta_ce": "ΔCE",
    "recovered_zero": "CE recovered (zero)",
    "recovered_mean": "CE recovered (mean)",
    "kl": "KL",
}


def render(report: Report) -> str:
    """The whole page."""
    style, script = (files(__package__).joinpath(n).read_text(encoding="utf-8") for n in ("page.css", "page.js"))
    about = " · ".join(f"{escape(k)} <b>{escape(v)}</b>" for k, v in report.about.items())
    rows = "".join(_row(latent) for latent in report.latents)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in report.notes)
    sections = "".join(_section(latent, report) for latent in report.latents)
    orders = "".join(f'<option value="{value}">{name}</option>' for value, name in ORDERS.items())
    title = escape(report.title)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<nav>
<form id="find" role="search">
<label for="number">Latent</label>
<input id="number" type="search" inputmode="numeric" placeholder="number" autocomplete="off">
<select id="sort" aria-label="order">{orders}</select>
<output id="said"></output>
</form>
<ol id="list">{rows}</ol>
</nav>
<main>
<header><h1>{title}</h1><p class="about">{about}</p>{_card(report)}{_density(report)}{notes}</header>
{sections}
</main>
<script>{script}</script>
</body>
</html>
"""


def _row(latent: Latent) -> str:
    said = f'data-number="{latent.number}" data-share="{latent.share:.9f}" data-peak="{latent.peak:.6f}"'
    return (
        f'<li {said}><a href="#latent-{latent.number}">{latent.number}</a><small>{percent(latent.share)}</small></li>'
    )


def _card(report: Report) -> str:
    if report.card is None:
        return '<p class="note">No card beside this run: add the callback SparseCard for one.</p>'
    card = report.card
    cells = [
        f'<div title="{escape(MEANING[n], quote=True)}"><dt>{said}</dt><dd>{shown(card[n])}</dd></div>'
        for n, said in MAIN.items()
        if n in card.numbers
    ]
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in card.notes)
    return f'<dl class="card">{"".join(cells)}</dl>{notes}'


def _density(report: Report) -> str:
    """Histogram of all latents, with a tick for each shown one."""
    if not report.density:
        return ""
    low, high = report.edges[0], report.edges[-1]
    span = high - low
    ticks = "".join(
        f'<line x1="{x:.2f}" x2="{x:.2f}" y1="63" y2="67"/>'
        for x in (100 * (math.log10(latent.share) - low) / span for latent in report.latents if latent.share > 0)
    )
    axis = "".join(f"<span>{percent(10**power)}</span>" for power in range(math.ceil(low), math.floor(high) + 1))
    svg = '<svg viewBox="0 0 100 68" preserveAspectRatio="none" role="img" aria-label="density of all latents">'
    svg += f"{bars(report.density, 100, 60)}<g class=ticks>{ticks}</g></svg>"
    live = sum(report.density)
    return (
        f'<figure class="density">{svg}<div class="axis">{axis}</div><figcaption>Density of all {live:,} live latents:'
        " share of tokens that a latent is active on, in steps of a quarter decade; ticks are the shown ones."
        "</figcaption></figure>"
    )


def _section(latent: Latent, report: Report) -> str:
    mini = f'<svg class="mini" viewBox="0 0 100 30" preserveAspectRatio="none">{bars(latent.histogram, 100, 30)}</svg>'
    facts = f"active on <b>{percent(latent.share)}</b> of tokens ({latent.fired:,}) · largest <b>{latent.peak:.3g}</b>"
    scale = f"<span>0</span><span>activation</span><span>{latent.peak:.3g}</span>"
    side = f"<figure>{mini}<figcaption>{scale}</figcaption></figure>"
    side += f'<div class="logits">{_logits("up", latent.up)}{_logits("down", latent.down)}</div>'
    side += _heads(latent.heads, report.heads)
    if latent.contexts:
        pictures = " pictures" if latent.contexts[0].picture else ""
        inside = "".join(_context(c, latent.peak) for c in latent.contexts)
        body = f'<div class="contexts{pictures}">{inside}</div>'
    else:
        why = "" if latent.fired else "never active on these tokens"
        body = f'<div class="contexts"><p class="note">{why}</p></div>'
    return (
        f'<section id="latent-{latent.number}"><h2><a href="#latent-{latent.number}">Latent {latent.number}</a></h2>'
        f'<p class="about">{facts}</p><div class="two"><aside>{side}</aside>{body}</div></section>\n'
    )


def _logits(name: str, found: Sequence[tuple[str, float]]) -> str:
    if not found:
        return ""
    most = max(abs(v) for _, v in found) or 1.0
    rows = [(f"<code>{visible(text.replace(' ', '␣'))}</code>", abs(v) / most, f"{v:+.2f}") for text, v in found]
    return _bars(name, f"logits {name}", "", rows)


def _heads(shares: Sequence[float], meaning: str) -> str:
    if not shares:
        return ""
    most = max(shares) or 1.0
    rows = [(f"head {head}", v / most, f"{100 * v:.0f} %") for head, v in enumerate(shares)]
    return _bars("heads", "attention heads", meaning, rows)


def _bars(kind: str, caption: str, meaning: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """Lines with a bar behind each: what (HTML), length in [0,1], number."""
    lines = "".join(
        f'<li style="--w:{100 * length:.0f}%"><span>{what}</span><span>{number}</span></li>'
        for what, length, number in rows
    )
    head = f'<h3 title="{escape(meaning, quote=True)}">{caption}</h3>'
    return f'<figure class="bars {kind}">{head}<ul>{lines}</ul></figure>'


def _context(context: Context, peak: float) -> str:
    row, at = context.where
    where = f'<small title="row {row} of the source, position {at}">{context.peak:.3g}</small>'
    if context.picture:
        return f"<figure>{_picture(context, peak)}<figcaption>{where}</figcaption></figure>"
    text = "".join(_piece(p.text, p.value, peak, i == context.at) for i, p in enumerate(context.pieces))
    return f'<p class="context">{where}<span>{text}</span></p>'


def _piece(text: str, value: float, peak: float, is_peak: bool) -> str:
    if value == 0 and not is_peak:
        return visible(text)
    strength = min(1.0, abs(value) / peak) if peak > 0 else 0.0
    kind = ' class="peak"' if is_peak else ""
    return f'<mark{kind} style="--a:{0.12 + 0.78 * strength:.2f}" title="{value:.3g}">{visible(text)}</mark>'


def _picture(context: Context, peak: float) -> str:
    """The image with a square over every active patch, the darker the weaker elsewhere."""
    high, wide = context.grid
    squares = "".join(
        f'<rect x="{i % wide}" y="{i // wide}" width="1" height="1" style="--a:{0.15 + 0.6 * min(1.0, v / peak):.2f}">'
        f"<title>{v:.3g}</title></rect>"
        for i, v in enumerate(context.heat)
        if v > 0
    )
    best = max(range(len(context.heat)), key=context.heat.__getitem__) if any(context.heat) else -1
    frame = f'<rect class="peak" x="{best % wide}" y="{best // wide}" width="1" height="1"/>' if best >= 0 else ""
    image = f'<image href="{context.picture}" width="{wide}" height="{high}" preserveAspectRatio="none"/>'
    return f'<svg viewBox="0 0 {wide} {high}">{image}{squares}{frame}</svg>'


def bars(counts: Sequence[int], width: float, height: float) -> str:
    """Bars of a histogram as SVG; every bin that isn't empty can be seen."""
    most = max(counts, default=0) or 1
    each = width / max(1, len(counts))
    return "".join(
        f'<rect x="{i * each:.2f}" y="{height - tall:.2f}" width="{each * 0.9:.2f}" height="{tall:.2f}">'
        f"<title>{n}</title></rect>"
        for i, n in enumerate(counts)
        if n and (tall := max(1.0, height * n / most))
    )


def visible(text: str) -> str:
    """Text for HTML, with line ends and tabs as signs."""
    return escape("".join(BLANKS.get(c, c) for c in text))


def percent(share: float) -> str:
    """A share in per cent, two significant digits."""
    return f"{float(f'{100 * share:.2g}'):g} %"
