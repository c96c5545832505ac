"""What the arms of the claim share: one language model a seed, and the autoencoder controls at the same budget."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import seed_everything

from quire.contracts import Batch
from quire.model import Model
from quire.reproduce import arm_trainer
from quire.roles.language.models import Seq2SeqDecoder
from quire.roles.language.next_token import NextToken
from quire.roles.latent.plain import Pooled
from quire.roles.tokens.text import TextEncoder
from quire.schedule import Constant
from quire_ariel.data import QuestionGrammar
from quire_ariel.decoder import VolumeDecoder
from quire_ariel.measures import Words
from quire_ariel.objective import TextAutoencoding
from quire_ariel.recurrent import GRULanguageModel
from quire_ariel.sentence import SentenceCodes, SentenceEncoder, divergence

WIDTH, BATCH, LATENT = 128, 128, 16
LM_EPOCHS, AE_EPOCHS = 8, 12


@dataclass(eq=False)
class Trial:
    """A trained model and its data."""

    model: Model
    data: QuestionGrammar
    seed: int

    @property
    def eos(self) -> int:
        """The end token."""
        return int(self.data.spec["eos"])

    @functools.cached_property
    def known(self) -> set[Words]:
        """Training sentences."""
        return {tuple(words) for words in self.data.drawn()["train"]}

    def train(self) -> Iterator[Batch]:
        """Training sentences in order."""
        return iter(self.data.loader("train"))

    def test(self) -> Iterator[Batch]:
        """Test sentences."""
        return iter(self.data.loader("test"))

    def bodies(self, batch: Batch) -> list[list[int]]:
        """Ids behind the start token."""
        return [t[m].tolist()[1:] for t, m in zip(batch["tokens"], batch["mask"])]

    def divergence(self, codes: Sequence[SentenceCodes]) -> float:
        """KL of a sentence in nats, over the training set."""
        means, spreads = (torch.cat([getattr(c, name) for c in codes]) for name in ("mean", "logvar"))
        return float(divergence(means, spreads))


def _trained(model: Model, seed: int, quick: bool, epochs: int) -> Trial:
    data = QuestionGrammar(held_out=100 if quick else 400, seed=seed, batch_size=BATCH)
    arm_trainer(max_epochs=epochs).fit(model, datamodule=data)
    model.refer_tokenizer(data.tokenizer)
    return Trial(model.eval(), data, seed)


def _model(**parts: Any) -> Model:
    return Model(**parts, optimizer=functools.partial(torch.optim.Adam, lr=0.002), schedule=Constant())


@functools.lru_cache(maxsize=1)
def language_model(seed: int, quick: bool) -> Trial:
    """The cube's language model, trained once for all widths and for the control."""
    seed_everything(seed, verbose=False)
    cube = VolumeDecoder(GRULanguageModel(width=WIDTH), latent_dim=LATENT)
    return _trained(_model(decoder=cube, objective=NextToken()), seed, quick, 6 if quick else LM_EPOCHS)


def autoencoder(settings: Mapping[str, Any], seed: int, quick: bool) -> Trial:
    """An autoencoder, a VAE where ``kl`` is set, or a Transformer's."""
    seed_everything(seed, verbose=False)
    epochs = 2 if quick else AE_EPOCHS
    if settings.get("transformer"):
        shape: dict[str, Any] = {"width": 64, "depth": 2, "heads": 4}
        inner = Pooled(TextEncoder(**shape, positions="sincos", lm_head=False))
        encoder, decoder = SentenceEncoder(LATENT, encoder=inner), Seq2SeqDecoder(**shape)
        return _trained(_model(encoder=encoder, decoder=decoder, objective=TextAutoencoding()), seed, quick, epochs)
    weight = float(settings.get("kl", 0.0))
    encoder = SentenceEncoder(LATENT, width=WIDTH, variational=bool(weight))
    objective = TextAutoencoding(kl_weight=weight)
    parts = {"encoder": encoder, "decoder": GRULanguageModel(width=WIDTH), "objective": objective}
    return _trained(_model(**parts), seed, quick, epochs)
