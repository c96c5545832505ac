"""DuplexAutoencoding, the whole pretraining method, and the bag of words alone (Xiao et al. 2022, arXiv 2211.08769)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import Callback
from torch import Tensor
from torch.nn import functional as F

from quire.contracts import Batch, Losses, Objective, Spec
from quire.errors import ConfigError, DataError
from quire.roles.tokens.contract import TokenEncoder, Tokens
from quire_dupmae.decoder import DuplexDecoder, rebuild
from quire_dupmae.masking import WholeWordMask
from quire_dupmae.modules import bag_loss, chunked_cross_entropy, pooled_logits

if TYPE_CHECKING:
    from quire.model import Model

FIELDS = ("tokens", "mask", "special", "word_ids")
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
"""A BERT for examples."""


def small_data(**more: Any) -> dict[str, Any]:
    """Docstrings with a small vocabulary."""
    tokenizer = {"class_path": "WordPiece", "init_args": {"size": 400}}
    sizes = {"max_length": 16, "query_length": 12, "batch_size": 16, "limit": 200}
    return {"class_path": "RetrievalTriplets", "init_args": {"tokenizer": tokenizer, **sizes, **more}}


def need_mask_token(spec: Spec, asker: Objective) -> int:
    """The mask token's id. Raises ``ConfigError`` when the data's tokenizer has no mask or no start token."""
    for name, word in (("mask_id", "mask"), ("bos", "CLS")):
        if spec.get(name) is None:
            raise ConfigError(
                f"{type(asker).__name__} needs a {word} token; the data's tokenizer {spec.get('tokenizer')} has none: "
                "use one of a masked language model, such as WordPiece"
            )
    return int(spec["mask_id"])


def check_ends(tokens: Tensor, mask: Tensor, start: int) -> None:
    """Refuse texts whose first token is not the start token, or that are nothing else.

    Raises:
        DataError: with the first such text.
    """
    for bad, said in (
        (tokens[:, 0] != start, "does not begin with the start token: use whole texts (unit: passage or line)"),
        (mask.sum(1) < 2, "has no token but the start token"),
    ):
        if bool(bad.any()):
            raise DataError(f"text {int(bad.nonzero()[0])} of the batch {said}")


class _Masked(Objective):
    """What both objectives share: the masked view of a text."""

    def __init__(self, masking: WholeWordMask | float, bow_target: str) -> None:
        super().__init__()
        self.masking = masking if isinstance(masking, WholeWordMask) else WholeWordMask(masking)
        if bow_target not in ("frequency", "set"):
            raise ConfigError(f"{type(self).__name__}: the bag's target is frequency or set, got {bow_target!r}")
        self.bow_target = bow_target

    def build(self, spec: Spec) -> None:
        """Note the mask token."""
        super().build(spec)
        self.mask_id, self.start_id = need_mask_token(spec, self), int(spec["bos"])
        self.ids = int(spec.code("vocab_size", self))

    def see(self, model: Model, batch: Batch) -> tuple[Tokens, Tensor, Tensor]:
        """The encoder's tokens of the masked text, which were hidden, and which are ordinary: [B,T] bool both."""
        tokens, mask = batch["tokens"], batch["mask"]
        ordinary = mask & ~batch["special"]
        generator = model.generator(tokens.device)
        hidden = self.masking.draw(batch["word_ids"], ordinary, mask, generator)
        seen = self.masking.corrupt(tokens, hidden, self.mask_id, self.ids, generator)
        return model.encoder({**batch, "tokens": seen}), hidden, ordinary

    def bag(self, model: Model, codes: Tokens, chunk: int) -> Tensor:
        """Pooled logits [B,V] of all tokens behind the first: the official maximum counts the end token too."""
        return pooled_logits(codes.values[:, 1:], codes.mask[:, 1:], model.encoder.logits, chunk)


class DuplexAutoencoding(_Masked):
    """Rebuild a text from its one vector, and its bag of words from its token states, beside an MLM. Xiao et al. 2022.

    The encoder sees a masked text. A weak decoder rebuilds all ordinary tokens from the first token's state and, row by
    row, another half of the original text; the maximum of the MLM logits over tokens must give the bag of words.
    RetroMAE is ``bow_weight: 0`` with the decoder's ``query: retro``.

    Args:
        masking: Whole-word masks of the encoder's view; a number is their ratio.
        bow_weight: Factor of the bag of words; 0 leaves it out. 0.1 is the official code's.
        bow_target: ``frequency``, counts over length as in the official code, or ``set``, every different token alike.
        decoder_weight: Factor of the decoder's loss; 0 leaves the decoder out: MLM alone, or with the bag.
        pictures: Texts whose strongest terms are drawn in ``terms.png`` at the end of fit; 0 for none.

    Needs:
        encoder: TokenEncoder with ``lm_head`` and a start token in the ids. decoder: DuplexDecoder.
        Fields: tokens, mask, special, word_ids (``TextTokens`` with ``unit: passage`` and ``word_ids: true``).

    Returns:
        ``mlm``: mean cross-entropy over hidden tokens. ``decoder``: the same over all ordinary tokens of the original.
        ``bow``: cross-entropy of the bag [B,V], mean over texts. All in nats, ln V at chance.

    Raises:
        ConfigError: a ratio outside (0, 1), a negative weight, a tokenizer without mask or start token.
        DataError: a text that doesn't begin with the start token.
    """

    encoder: TokenEncoder
    decoder: DuplexDecoder
    fields = FIELDS
    requires = {"encoder": frozenset({"lm_head"})}

    def __init__(
        self,
        masking: WholeWordMask | float = 0.3,
        bow_weight: float = 0.1,
        bow_target: Literal["frequency", "set"] = "frequency",
        decoder_weight: float = 1.0,
        pictures: int = 3,
    ) -> None:
        super().__init__(masking, bow_target)
        for name, value in (("bow_weight", bow_weight), ("decoder_weight", decoder_weight), ("pictures", pictures)):
            if value < 0:
                raise ConfigError(f"DuplexAutoencoding.{name} must be at least 0, got {value}")
        self.weights = {"bow": bow_weight, "decoder": decoder_weight}
        self.pictures = pictures

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small BERT on docstrings."""
        encoder = {"class_path": "RetrievalEncoder", "init_args": {"name_or_config": SMALL, "dense_dim": None}}
        return {
            "model": {"encoder": encoder, "decoder": "DuplexDecoder", "objective": "DuplexAutoencoding"},
            "data": small_data(),
        }

    def callbacks(self) -> list[Callback]:
        """The pictures."""
        from quire_dupmae.pictures import TermPictures

        return [TermPictures(texts=self.pictures)] if self.pictures else []

    def forward(self, model: Model, batch: Batch) -> Losses:
        """The three terms of one batch."""
        head, decoder = model.encoder.logits, model.decoder.role(DuplexDecoder)
        tokens, mask = batch["tokens"], batch["mask"]
        if not tokens.is_cuda:  # on a GPU it would wait
            check_ends(tokens, mask, self.start_id)
        codes, hidden, ordinary = self.see(model, batch)
        logits, wanted = head(codes.values[hidden]), tokens[hidden]
        count = max(1, len(wanted))
        terms = {"mlm": F.cross_entropy(logits.float(), wanted, reduction="sum") / count}
        vector = codes.values[:, 0]
        if self.weights["decoder"]:
            visible = decoder.visible(batch["word_ids"], ordinary, mask, model.generator(tokens.device))
            states = rebuild(decoder, model.encoder, vector, model.encoder.embed(batch), visible)
            terms["decoder"] = chunked_cross_entropy(states[ordinary], tokens[ordinary], head, decoder.chunk)
        if self.weights["bow"]:
            terms["bow"] = bag_loss(self.bag(model, codes, decoder.chunk), tokens, ordinary, self.bow_target)
        metrics = {"mlm_accuracy": lambda: (logits.argmax(-1) == wanted).float().sum() / count}
        return Losses(terms, metrics, {"codes": codes})


class BagOfWords(_Masked):
    """Predict a text's bag of words from the maximum of its MLM logits over tokens. Xiao et al. 2022 (DupMAE).

    Alone it is a second loss, in a ``Sum``, for any text encoder with a vocabulary head.

    Args:
        weight: Factor of the term.
        target: ``frequency`` or ``set``, as in ``DuplexAutoencoding``.
        masking: Whole-word masks of the encoder's view; a number is their ratio.
        chunk: Tokens whose logits exist at a time.

    Needs:
        encoder: TokenEncoder with ``lm_head``. Fields: tokens, mask, special, word_ids.

    Returns:
        ``bow``: cross-entropy between the bag and the softmax of the pooled logits [B,V], mean over texts, in nats.

    Raises:
        ConfigError: a ratio outside (0, 1), another target, ``chunk`` below 1, a tokenizer without mask token.
    """

    encoder: TokenEncoder
    fields = FIELDS
    requires = {"encoder": frozenset({"lm_head"})}

    def __init__(
        self,
        weight: float = 1.0,
        target: Literal["frequency", "set"] = "frequency",
        masking: WholeWordMask | float = 0.3,
        chunk: int = 1024,
    ) -> None:
        super().__init__(masking, target)
        if chunk < 1:
            raise ConfigError(f"BagOfWords.chunk must be at least 1, got {chunk}")
        self.weights, self.chunk = {"bow": weight}, chunk

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Core's text encoder on docstrings."""
        encoder = {"class_path": "TextEncoder", "init_args": {"width": 32, "depth": 1, "heads": 2}}
        return {"model": {"encoder": encoder, "objective": "BagOfWords"}, "data": small_data()}

    def forward(self, model: Model, batch: Batch) -> Losses:
        """The term of one batch."""
        codes, _, ordinary = self.see(model, batch)
        bag = self.bag(model, codes, self.chunk)
        return Losses({"bow": bag_loss(bag, batch["tokens"], ordinary, self.bow_target)}, outputs={"codes": codes})
