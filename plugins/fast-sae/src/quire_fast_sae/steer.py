"""Push a chat model along one latent's direction while it answers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from quire.contracts import Batch, Sampler
from quire.errors import ConfigError
from quire.roles.language.loop import Greedy, Sample
from quire.roles.sites.subject import Subject
from quire.roles.sparse.decoder import SparseDecoder
from quire_fast_sae.instances import tiny_feed

ALPHAS = [0.0, 15.0, 25.0, 50.0, 100.0, 150.0, 200.0]


class Steer(Sampler):
    """Answers of the subject while alpha times a latent's direction is added at a site. Li, Ye et al. 2025.

    The direction is the latent's decoder row, of norm 1, so alpha is in units of the activation. It is added at every
    position, the prompt's too, and once to each new one. Prompts are the data's whole samples up to ``prompt_length``.

    Args:
        latent: Number of the latent, or several, each on its own.
        alpha: Strengths; 0 is the subject as it is, negative ones push the other way.
        site: Where; null is the site that the dictionary was trained at.
        max_new_tokens: Exact limit of each answer.
        greedy: The likeliest token each time; false draws, with one seed for all strengths.

    Needs:
        decoder: SparseDecoder. data: a module with a language model as its subject.

    Returns:
        One row a prompt: ``index``, ``prompt`` and ``answers``, a list of ``latent``, ``alpha``, ``tokens``, ``text``.

    Raises:
        ConfigError: a latent that the dictionary doesn't have, no strength, or a subject that writes nothing.
    """

    decoder: SparseDecoder
    fields = ("tokens",)
    loop: Greedy | Sample
    exempt: ClassVar[dict[str, str]] = {
        "reloads": "its answers are the subject's, which belongs to the data and is in no checkpoint",
        "exports": "its answers are the subject's, which belongs to the data and is in no export",
    }

    def __init__(
        self,
        latent: int | list[int] = 0,
        alpha: list[float] | None = None,
        site: str | None = None,
        max_new_tokens: int = 128,
        greedy: bool = True,
    ) -> None:
        super().__init__()
        self.latents = [latent] if isinstance(latent, int) else list(latent)
        self.alphas = list(ALPHAS if alpha is None else alpha)
        if not self.latents or min(self.latents) < 0:
            raise ConfigError(f"Steer.latent must be one or more numbers from 0, got {latent}")
        if not self.alphas:
            raise ConfigError("Steer.alpha needs at least one strength")
        self.site = site
        loop = Greedy(max_new_tokens) if greedy else Sample(max_new_tokens=max_new_tokens)
        self.refer("loop", loop)  # no part of the model, whose decoder is the dictionary's

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small language model with random weights, pushed along one latent."""
        run = tiny_feed("InstructActivations", contexts=4)
        given = {"latent": 3, "alpha": [0.0, 5.0], "max_new_tokens": 4}
        run["model"]["sampler"] = {"class_path": cls.__name__, "init_args": given}
        return run

    def bind(self, model: Any) -> None:
        """Check the latents against the dictionary."""
        super().bind(model)
        most = model.decoder.role(SparseDecoder).latents
        if max(self.latents) >= most:
            raise ConfigError(f"Steer.latent is {max(self.latents)}, but the dictionary has {most} latents, from 0")

    @torch.no_grad()
    def forward(self, model: Any, batch: Batch) -> list[dict[str, Any]]:
        """Answer every prompt at every strength."""
        subject = model.subject
        if subject is None or subject.steps is None:
            have = "no subject" if subject is None else f"subject {subject.name}, which writes no text"
            raise ConfigError(f"Steer needs data with a language model as its subject; there is {have}")
        site = self.site or (model.spec or {}).get("site")
        if site is None:
            raise ConfigError("Steer.site is not set and the data names no site")
        rows = model.decoder.role(SparseDecoder).W_dec
        asked: dict[str, Any] = {k: batch[k] for k in ("tokens", "mask", "prompt_length", "index") if k in batch}
        tok = subject.tokenizer
        made: list[dict[str, Any]] = [{"index": i, "prompt": _text(tok, p), "answers": []} for i, p in _prompts(asked)]
        for latent in self.latents:
            for alpha in self.alphas:
                ids = self.answers(subject, asked, site, normalize(rows[latent].float(), dim=0), alpha)
                for row, one in zip(made, ids):
                    row["answers"].append({"latent": latent, "alpha": alpha, "tokens": one, "text": _text(tok, one)})
        return made

    def answers(self, subject: Subject, batch: Batch, site: str, direction: Tensor, alpha: float) -> list[list[int]]:
        """Ids of each row's answer at one strength."""
        with subject.sites.steer(site, direction, alpha):
            made = self.loop(_Alone(subject), batch)
        return [row[0] for row in made.tokens]


class _Alone:
    """The subject as the model of a decoding loop."""

    encoder = None

    def __init__(self, subject: Subject) -> None:
        self.decoder, self.tokenizer = subject.steps, subject.tokenizer


def _prompts(batch: Batch) -> list[tuple[int, list[int]]]:
    tokens = batch["tokens"]
    mask = batch.get("mask", torch.ones_like(tokens, dtype=torch.bool))
    rows = [t[m].tolist() for t, m in zip(tokens, mask)]
    lengths = batch["prompt_length"].tolist() if "prompt_length" in batch else [len(r) for r in rows]
    index = batch["index"].tolist() if "index" in batch else range(len(rows))
    return [(i, row[:n]) for i, row, n in zip(index, rows, lengths)]


def _text(tokenizer: Any, ids: list[int]) -> str:
    return "" if tokenizer is None else tokenizer.decode(ids)
