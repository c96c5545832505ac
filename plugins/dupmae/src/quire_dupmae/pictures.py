"""TermPictures: what a pretrained encoder says a text is about, as bars over the vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quire.contracts import Batch
from quire.errors import ConfigError
from quire.roles.pictures import EndPictures
from quire.roles.tokens.contract import TokenEncoder
from quire_dupmae.modules import pooled_logits


class TermPictures(EndPictures):
    """Draw the strongest terms of a few texts, those in the text apart from those it lacks. Xiao et al. 2022 (DupMAE).

    ``DuplexAutoencoding`` brings one along; list it to change its arguments. At the end of fit it writes ``terms.png``
    beside the run's log: the largest pooled MLM logits of the unmasked text, which the lexical embedding keeps.

    Args:
        texts: Number of texts, the first of the validation split, or of training without one.
        terms: Bars for each text.
        file: Name of the picture.

    Needs:
        encoder: TokenEncoder with ``lm_head``; a data module with a tokenizer.

    Raises:
        ConfigError: ``texts`` or ``terms`` below 1, an encoder without a vocabulary head.
    """

    encoder: TokenEncoder
    requires = {"encoder": frozenset({"lm_head"})}

    def __init__(self, texts: int = 3, terms: int = 14, file: str = "terms.png") -> None:
        if texts < 1 or terms < 1:
            raise ConfigError(f"TermPictures.texts and terms must be at least 1, got {texts} and {terms}")
        super().__init__(texts, file, seed=0)
        self.texts, self.terms = texts, terms

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Pretraining on docstrings with two texts."""
        from quire_dupmae.objective import DuplexAutoencoding

        callback = {"class_path": "TermPictures", "init_args": {"texts": 2}}
        return {**DuplexAutoencoding.tiny(), "trainer": {"callbacks": [callback]}}

    def draw(self, model: Any, batch: Batch, folder: Path) -> dict[Path, str]:
        """Embed, name the terms, draw; nothing without a tokenizer or without texts."""
        tok = model.tokenizer
        if tok is None or any(name not in batch for name in ("tokens", "mask", "special")):
            return {}
        codes = model.encoder({"tokens": batch["tokens"], "mask": batch["mask"]})
        kept = batch["mask"] & ~batch["special"]
        pooled = pooled_logits(codes.values, kept, model.encoder.logits, 1024)
        best = pooled.topk(min(self.terms, pooled.shape[1]), dim=1)
        rows = []
        for ids, real, places, values in zip(batch["tokens"], kept, best.indices.tolist(), best.values.tolist()):
            own = set(ids[real].tolist())
            rows.append((tok.decode(ids[real].tolist()), [(word(tok, p), v, p in own) for p, v in zip(places, values)]))
        draw(folder / self.file, rows)
        inside = sum(own for _, bars in rows for _, _, own in bars)
        return {folder / self.file: f"{inside} of {len(rows) * len(rows[0][1])} strongest terms are in their text"}


def word(tok: Any, place: int) -> str:
    """One entry of the vocabulary, as it is written."""
    inner = getattr(tok, "inner", None)
    return inner.id_to_token(place) if hasattr(inner, "id_to_token") else tok.decode([place]) or f"<{place}>"


def draw(file: Path, rows: list[tuple[str, list[tuple[str, float, bool]]]]) -> None:
    """A row of bars for each text.

    Args:
        file: PNG to write; its folder is made.
        rows: The text, and its terms: word, value, whether it is in the text.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.6 + 2.1 * len(rows)), layout="constrained")
    for i, (text, bars) in enumerate(rows):
        axes = figure.add_subplot(len(rows), 1, i + 1)
        colours = ["#1f3b57" if own else "#e0a458" for _, _, own in bars]
        axes.bar(range(len(bars)), [v for _, v, _ in bars], color=colours, width=0.7)
        axes.set_xticks(range(len(bars)), [w for w, _, _ in bars], rotation=30, ha="right", fontsize=8)
        axes.set_title(text if len(text) < 110 else f"{text[:107]}…", fontsize=8, loc="left", parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", labelsize=7)
    figure.suptitle("largest pooled logits: in the text (dark), not in it (light)", fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(str(file), dpi=120)
