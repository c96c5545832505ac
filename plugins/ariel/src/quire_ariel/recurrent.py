"""Small recurrent language models, as in Celotti et al. 2020: alone under the cube, or behind a vector as a control."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from quire.contracts import Codes, Spec
from quire.errors import ConfigError
from quire.roles.language.blocks import dropout_of
from quire.roles.language.contract import Caps, DecodeState, StepModel
from quire.roles.language.rows import left_aligned
from quire.roles.latent.contract import check_positive, vector_of


class GRULanguageModel(StepModel):
    """Gated recurrent units that continue tokens, one hidden state a row. For Celotti et al. 2020.

    With an encoder of vectors in the model its vector gives the first hidden state; without one it starts from zero.

    Args:
        width: Hidden units, H.
        embedding: Width of a token's embedding, E.
        layers: Recurrent layers.
        dropout: On embeddings and on what the head reads, in [0, 1).

    Returns:
        ``forward(codes, tokens [B,T], mask [B,T]) -> logits [B,T,V]``; ``codes`` VectorCodes [B,D] or None.

    Raises:
        ConfigError: an argument out of range, codes missing or not expected, or slots kept out of order.
    """

    cell: ClassVar[Any] = nn.GRU
    states: ClassVar[int] = 1
    """Tensors that the cell hands on."""

    def __init__(self, width: int = 128, embedding: int = 48, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        check_positive(self, "width, embedding and layers", width, embedding, layers)
        if not 0 <= dropout < 1:
            raise ConfigError(f"{type(self).__name__}.dropout must be in [0, 1), got {dropout}")
        self.width, self.embedding, self.layers, self.dropout = width, embedding, layers, dropout

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Questions of the small grammar."""
        data = {"class_path": "QuestionGrammar", "init_args": {"sentences": 128, "held_out": 16, "batch_size": 16}}
        decoder = {"class_path": cls.__name__, "init_args": {"width": 16, "embedding": 8}}
        return {"model": {"decoder": decoder, "objective": "NextToken", "sampler": "Greedy"}, "data": data}

    def build(self, spec: Spec) -> None:
        """Embedding, cells and head; a bridge from the encoder's vector where there is an encoder."""
        vocab, eos = int(spec.need("vocab_size", self)), spec.get("eos")
        why = f"{type(self).__name__} holds one state, not slots: use a chain drafter"
        self._caps = Caps(
            vocab,
            tree_mask=False,
            gather=False,
            eos_ids=() if eos is None else (int(eos),),
            pad_id=int(spec.get("pad") or 0),
            start_id=spec.get("bos"),
            lacks={"tree_mask": why, "gather": why},
        )
        given = (spec.get("codes") or {}).get("width")
        self.token = nn.Embedding(vocab, self.embedding)
        self.rnn = self.cell(self.embedding, self.width, self.layers, batch_first=True)
        self.head = nn.Linear(self.width, vocab)
        self.bridge = None if given is None else nn.Linear(int(given), self.states * self.layers * self.width)
        self.drop = dropout_of(self.dropout)

    def caps(self) -> Caps:
        """No trees: a hidden state can't be cut into slots."""
        return self._caps

    def embed(self, ids: Tensor) -> Tensor:
        """[…] → […,E]."""
        return self.token(ids)

    # ---- training
    def forward(self, codes: Codes | None, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B,T,V] of every place; what padding says means nothing."""
        ids, _, back = left_aligned(tokens, mask, "sentence")
        out, _ = self.rnn(self.drop(self.embed(ids)), self._cells(self._first(codes, len(ids))))
        if back is not None:
            out = out.gather(1, back[..., None].expand_as(out))
        return self.head(self.drop(out))

    def _first(self, codes: Codes | None, rows: int) -> Tensor:
        """[S,L,B,H] before the first token."""
        shape = (self.states, self.layers, rows, self.width)
        if self.bridge is None:
            if getattr(codes, "vector", None) is not None:
                raise ConfigError(
                    f"{type(self).__name__} was built without an encoder: set model.encoder to give it codes"
                )
            return self.head.weight.new_zeros(shape)
        if codes is None:
            raise ConfigError(f"{type(self).__name__} was built behind an encoder: it needs the encoder's vector")
        first = torch.tanh(self.bridge(vector_of(codes, self).to(self.bridge.weight.dtype)))
        return first.view(rows, self.states, self.layers, self.width).permute(1, 2, 0, 3).contiguous()

    def _cells(self, held: Tensor) -> Any:
        return held[0]

    def _held(self, cells: Any) -> Tensor:
        return cells[None]

    # ---- stepping
    def open(
        self, prompt: Tensor, mask: Tensor | None = None, codes: Codes | None = None, max_length: int | None = None
    ) -> DecodeState:
        """Read the prompts; the state is what each row's last real token leaves."""
        ids, counts, _ = left_aligned(prompt, mask, "prompt")
        ids = ids[:, : max(counts)]
        x: Any = self.drop(self.embed(ids))
        lengths = torch.tensor(counts, device=ids.device)
        if min(counts) < ids.shape[1]:
            x = pack_padded_sequence(x, torch.tensor(counts), batch_first=True, enforce_sorted=False)
        _, cells = self.rnn(x, self._cells(self._first(codes, len(ids))))
        held = self._held(cells)
        state = DecodeState(lengths, self.head(self.drop(held[0, -1])).float(), held)
        state.extras["cache_bytes"] = held.numel() * held.element_size()
        return state

    def step(
        self,
        state: DecodeState,
        ids: Tensor | None,
        embeds: Tensor | None = None,
        parents: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Q slots behind each row's kept ones; see ``StepModel.step``. Trees are refused."""
        if parents is not None:
            raise ConfigError(self._caps.lacks["tree_mask"])
        x = self.embed(ids) if ids is not None else embeds
        assert x is not None
        trail, logits = [state.cache], []
        for q in range(x.shape[1]):
            out, cells = self.rnn(self.drop(x[:, q : q + 1]), self._cells(trail[-1]))
            held = self._held(cells)
            if valid is not None:
                held = held.where(valid[:, q].to(held.device)[None, None, :, None], trail[-1])
            trail.append(held)
            logits.append(self.head(self.drop(out)))
        state.pending = x.shape[1]
        state.extras["trail"], state.extras["valid"] = trail, valid
        return torch.cat(logits, 1).float()

    def keep(self, state: DecodeState, chosen: Tensor) -> None:
        """Go back to the state behind the last slot kept; the slots before it are kept with it."""
        trail, valid = state.extras.pop("trail"), state.extras.pop("valid")
        if len(trail) == 2 and bool((chosen == 0).all()):
            state.cache = trail[1]
            state.lengths = state.lengths + 1
        else:
            last = self._last(chosen, valid).to(state.lengths.device)
            rows = torch.arange(len(last), device=last.device)
            state.cache = torch.stack(trail)[last, :, :, rows].permute(1, 2, 0, 3).contiguous()
            state.lengths = state.lengths + (chosen >= 0).sum(1).to(last.device)
        state.pending = 0

    def _last(self, chosen: Tensor, valid: Tensor | None) -> Tensor:
        """Slots up to the last one kept, [B]. Raises ``ConfigError`` when one before it is left out."""
        ends = []
        for i, row in enumerate(chosen.tolist()):
            kept = [c for c in row if c >= 0]
            end = kept[-1] + 1 if kept else 0
            real = [q for q in range(end) if valid is None or bool(valid[i, q])]
            if kept != real:
                raise ConfigError(self._caps.lacks["gather"])
            ends.append(end)
        return torch.tensor(ends)

    def rows(self, state: DecodeState, order: Tensor) -> None:
        """Select rows of everything."""
        state.lengths, state.logits = state.lengths[order], state.logits[order]
        state.cache = state.cache[:, :, order].contiguous()

    def cut(self, state: DecodeState, lengths: Tensor) -> None:
        """Refused: what the state was before is gone. Raises ``ConfigError``."""
        raise ConfigError(f"{type(self).__name__} can't go back to an earlier token: use CausalLM for self-drafting")


class LSTMLanguageModel(GRULanguageModel):
    """Long short-term memory that continues tokens, the paper's kind of language model. Celotti et al. 2020.

    Args:
        width, embedding, layers, dropout: As in ``GRULanguageModel``.

    Returns:
        ``forward(codes, tokens [B,T], mask [B,T]) -> logits [B,T,V]``; ``codes`` VectorCodes [B,D] or None.

    Raises:
        ConfigError: as ``GRULanguageModel``.
    """

    cell = nn.LSTM
    states = 2

    def _cells(self, held: Tensor) -> Any:
        return held[0], held[1]

    def _held(self, cells: Any) -> Tensor:
        return torch.stack(cells)
