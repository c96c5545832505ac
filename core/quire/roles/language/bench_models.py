"""Models under a decoding benchmark: the two scripted shapes, a checkpoint, or a transformers folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.contracts import Codes, Spec, build
from quire.errors import ConfigError
from quire.roles.language.contract import Caps, DecodeState, StepModel
from quire.roles.language.models import CausalLM

LIFT = 1e4  # added to the script's logit: larger than any of a network's own
WIDTH, DEPTH, HEADS, VOCAB, PLACES = 384, 6, 6, 8192, 2048
IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


class Scripted(StepModel):
    """A step model whose whole network runs while a script decides what it says.

    Args:
        inner: The model that runs.
    """

    def __init__(self, inner: StepModel) -> None:
        super().__init__()
        self.inner = inner
        self.texts: dict[tuple[int, ...], list[int]] = {}

    def follow(self, prompts: Sequence[list[int]], scripts: Sequence[list[int]]) -> None:
        """Say ``scripts[i]`` behind ``prompts[i]``; other prompts are left to the network."""
        self.texts = {tuple(p): p + s for p, s in zip(prompts, scripts)}

    def caps(self) -> Caps:
        """The model's own."""
        return self.inner.caps()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The network alone."""
        return self.inner(*args, **kwargs)

    def open(
        self, prompt: Tensor, mask: Tensor | None = None, codes: Codes | None = None, max_length: int | None = None
    ) -> DecodeState:
        """Prefill, and find each prompt's script."""
        state = self.inner.open(prompt, mask, codes, max_length)
        self._lifted(state, state.logits[:, None], prompt, mask)
        return state

    def open_drafted(
        self,
        draft: Tensor,
        prompt: Tensor,
        mask: Tensor | None = None,
        codes: Codes | None = None,
        max_length: int | None = None,
    ) -> DecodeState | None:
        """The model's own, with each prompt's script."""
        state = self.inner.open_drafted(draft, prompt, mask, codes, max_length)
        if state is not None:
            self._lifted(state, state.logits, prompt, mask)
        return state

    def _lifted(self, state: DecodeState, logits: Tensor, prompt: Tensor, mask: Tensor | None) -> None:
        real = torch.ones_like(prompt, dtype=torch.bool) if mask is None else mask
        texts = [self.texts.get(tuple(ids[keep].tolist()), []) for ids, keep in zip(prompt, real)]
        state.extras["texts"] = texts
        lift(logits, texts, [list(range(n - logits.shape[1], n)) for n in state.lengths.tolist()])

    def step(
        self,
        state: DecodeState,
        ids: Tensor | None,
        embeds: Tensor | None = None,
        parents: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """The network's step; each slot's logits then say the script's next token."""
        starts, width = state.lengths.tolist(), (ids if ids is not None else embeds).shape[1]  # type: ignore[union-attr]
        logits = self.inner.step(state, ids, embeds, parents, valid)
        places = [list(range(n, n + width)) for n in starts]
        if parents is not None:
            for row, above in zip(places, parents.tolist()):
                start = row[0]
                for i, parent in enumerate(above):
                    row[i] = start if parent < 0 else row[parent] + 1
        lift(logits, state.extras["texts"], places)
        return logits

    def keep(self, state: DecodeState, chosen: Tensor) -> None:
        """The model's own."""
        self.inner.keep(state, chosen)

    def cut(self, state: DecodeState, lengths: Tensor) -> None:
        """The model's own."""
        self.inner.cut(state, lengths)

    def rows(self, state: DecodeState, order: Tensor) -> None:
        """Scripts follow their rows."""
        self.inner.rows(state, order)
        state.extras["texts"] = [state.extras["texts"][i] for i in order.tolist()]

    def embed(self, ids: Tensor) -> Tensor:
        """The model's own."""
        return self.inner.embed(ids)

    def iter_layers(self) -> Sequence[Any]:
        """The model's own."""
        return self.inner.iter_layers()

    def shallow(self, **how: Any) -> StepModel:
        """The same script over fewer layers."""
        made = Scripted(self.inner.shallow(**how))
        made.texts = self.texts
        return made


def lift(logits: Tensor, texts: Sequence[list[int]], places: Sequence[list[int]]) -> None:
    """Add ``LIFT`` in place to the logit of each text's next token: ``logits`` [B,Q,V] behind the slots ``places``."""
    if all(texts):
        said = [[text[min(p + 1, len(text) - 1)] for p in row] for text, row in zip(texts, places)]
        index = torch.tensor(said, device=logits.device)[:, :, None]
        logits.scatter_add_(2, index, logits.new_full(index.shape, LIFT))


@dataclass
class Subject:
    """One model of a benchmark.

    Attributes:
        name: For the table.
        decoder: What samplers step.
        module: The transformers model inside, for ``generate``; None without one.
        encode: Text → ids, or None without a tokenizer.
        tokenizer: Quire's, or None.
    """

    name: str
    decoder: StepModel
    module: Any = None
    encode: Callable[[str], list[int]] | None = None
    tokenizer: Any = None


def shapes(kind: str, quick: bool = False) -> list[Subject]:
    """The shape as a transformers model, and Quire's own model of the same shape; random weights, always scripted."""
    from quire.roles.language.hf import HFCausal

    width, depth, heads, vocab = (32, 1, 2, 256) if quick else (WIDTH, DEPTH, HEADS, VOCAB)
    ffn = 8 * width // 3 if kind == "llama" else 4 * width
    config = {"model_type": kind, "vocab_size": vocab, "hidden_size": width, "num_hidden_layers": depth, **IDS}
    config |= {"num_attention_heads": heads, "max_position_embeddings": PLACES}
    if kind == "llama":
        config["intermediate_size"] = ffn
        own = CausalLM(width, depth, heads, ffn, norm="rms", mlp="swiglu", tie=False)
    else:
        own = CausalLM(width, depth, heads, ffn, rope=False)
    torch.manual_seed(0)
    made = HFCausal(config=config)
    build(made, Spec())
    build(own, Spec({"vocab_size": vocab, "length": PLACES}))
    made.eval()
    return [Subject("HFCausal", made, made.module), Subject("CausalLM", own.eval())]


def loaded(path: str) -> list[Subject]:
    """A Quire checkpoint or exported folder, or a folder of transformers.

    Raises:
        ConfigError: nothing that can be read there, or a model that can't be stepped or reads a source.
    """
    place = Path(path).expanduser()
    exported = (place / "config.json").is_file() and '"hyper_parameters"' in (place / "config.json").read_text("utf-8")
    if place.is_dir() and not exported:
        return [_transformers(str(place))]
    from quire.checkpoint import load

    model = load(path)
    target = None if model.decoder is None else model.decoder.role(StepModel)
    if target is None:
        raise ConfigError(f"{path} has no decoder that can be stepped: quire bench language needs a StepModel")
    if model.encoder is not None or getattr(target, "crosses", False):
        raise ConfigError(f"{path} reads a source: quire bench language measures decoder-only models")
    tokenizer = getattr(model, "tokenizer", None)
    encode = None if tokenizer is None else tokenizer.encode
    return [Subject(type(target).__name__, target.eval(), getattr(target, "module", None), encode, tokenizer)]


def _transformers(path: str) -> Subject:
    from quire.roles.language.hf import HFCausal

    made = HFCausal(name=path)
    build(made, Spec())
    try:
        from transformers import AutoTokenizer

        encode = AutoTokenizer.from_pretrained(path).encode
    except (OSError, ValueError):  # a folder without a tokenizer still takes ids
        encode = None
    return Subject("HFCausal", made.eval(), made.module, encode)
