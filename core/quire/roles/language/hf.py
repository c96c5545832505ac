"""Any transformers language model as a step model: decoder-only or encoder-decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quire.contracts import Batch, Codes, Spec
from quire.errors import ConfigError
from quire.roles.language.hf_model import MASKED, HFModel, given
from quire.roles.language.rows import left_aligned


class HFCausal(HFModel):
    """A decoder-only transformers model.

    Args:
        name: A folder or hub name for ``AutoModelForCausalLM``, with weights.
        config: A config in its place, ``{"model_type": "llama", …}``, with random weights; sizes and special tokens
            that it leaves out come from the data.
        attn_implementation: ``sdpa`` or ``eager``; with others trees and ragged batches are refused.
        dtype: ``float32``, ``bfloat16`` or ``float16``; null takes the weights' own.
        cache: ``full`` keeps every token; ``sliding`` keeps a sliding-window model's window alone, for chains in
            batches of one.

    Returns:
        ``forward(codes, tokens [B,T], mask [B,T]) -> logits [B,T,V]``.

    Raises:
        ConfigError: no such model, an encoder-decoder, layers whose memory can't be cut, a vocabulary too small.
    """

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small GPT-2 from its config."""
        from quire.roles.language.accept import tiny_speculative

        config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
        return tiny_speculative({}, decoder={"class_path": "HFCausal", "init_args": {"config": config}})

    def forward(
        self, codes: Codes | None, tokens: Tensor, mask: Tensor | None = None, doc: Tensor | None = None
    ) -> Tensor:
        """Logits [B,T,V]; padding may stand on either side.

        Args:
            codes: Not used.
            tokens: [B,T] int64.
            mask: [B,T] bool, True = real; None: no padding.
            doc: [B,T] int64, attention stays within a document; needs sdpa or eager attention.
        """
        shifted, _, back = left_aligned(tokens, mask, "row")
        seen = None
        if doc is not None:
            if self._decoder_config._attn_implementation not in MASKED:
                raise ConfigError(f"NextToken.doc_mask: {self._lacking()['tree_mask']}")
            doc = left_aligned(doc, mask, "row")[0]
            steps = torch.arange(shifted.shape[1], device=tokens.device)[None].expand(len(shifted), -1)
            inside = (doc[:, :, None] == doc[:, None, :]) & (steps[:, :, None] >= steps[:, None, :])
            seen = self._masks(inside, steps, steps)
        arguments = self._arguments(shifted, None, seen, None)
        logits = self.module(**arguments, use_cache=False, return_dict=True).logits
        return logits if back is None else logits.gather(1, back[:, :, None].expand(-1, -1, logits.shape[2]))


@dataclass
class Encoded(Codes):
    """What an encoder made of the source.

    Attributes:
        values: [B,S,D].
        mask: [B,S] bool, True = real, or None.
    """

    values: Tensor
    mask: Tensor | None = None


class HFSeq2Seq(HFModel):
    """An encoder-decoder transformers model; it reads ``source`` itself, or another encoder's tokens.

    Args:
        name: A folder or hub name for ``AutoModelForSeq2SeqLM``, with weights.
        config: A config in its place, ``{"model_type": "bart", …}``, with random weights; sizes and special tokens
            that it leaves out come from the data.
        attn_implementation: ``sdpa`` or ``eager``; with others trees and ragged batches are refused.
        dtype: ``float32``, ``bfloat16`` or ``float16``; null takes the weights' own.
        cache: ``full``.

    Needs:
        encoder: none, or one that gives tokens; a projection is learned where its width differs.

    Returns:
        ``forward(codes, tokens [B,T], mask [B,T]) -> logits [B,T,V]``; ``codes`` are the source's.

    Raises:
        ConfigError: no such model, a decoder-only model, a vocabulary too small, no source.
    """

    crosses = True
    bridge: nn.Module

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small BART from its config, on digit strings."""
        layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        wide = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64}
        decoder = {"class_path": "HFSeq2Seq", "init_args": {"config": {"model_type": "bart", **layers, **wide}}}
        sampler = {"class_path": "Greedy", "init_args": {"max_new_tokens": 8}}
        data = {"class_path": "Algorithmic", "init_args": {"samples": 64, "batch_size": 8}}
        return {"model": {"decoder": decoder, "objective": "Seq2SeqTokens", "sampler": sampler}, "data": data}

    def check(self, model: Any) -> None:
        """It reads ``source`` unless another encoder does."""
        super().check(model)
        self.refer("fields", ("source",) if model.encoder is None else ())

    def build(self, spec: Spec) -> None:
        """As HFCausal; with another encoder, the module's own is frozen and a projection joins their widths."""
        super().build(spec)
        if spec.get("codes"):
            decoder = self.module.get_decoder()
            theirs, own = spec.code("width", self), decoder.get_input_embeddings().embedding_dim
            self.bridge = nn.Identity() if theirs == own else nn.Linear(theirs, own)
            used = {id(p) for p in decoder.parameters()}  # embeddings are shared as a rule
            for parameter in self.module.get_encoder().parameters():
                parameter.requires_grad_(parameter.requires_grad and id(parameter) in used)

    def _take(self, module: Any, generation: Any) -> None:
        self.bridge = nn.Identity()
        super()._take(module, generation)

    def encode(self, batch: Batch) -> Encoded:
        """The module's own encoder over ``source`` [B,S] and ``source_mask``; padding may stand on either side."""
        if "source" not in batch:
            raise ConfigError("HFSeq2Seq needs a source: the batch has no field source, and model.encoder is not set")
        mask = batch.get("source_mask")
        ids, counts, _ = left_aligned(batch["source"], mask, "source")
        ids = ids[:, : max(counts)]
        most = getattr(self.module.config, "max_position_embeddings", None)
        if most is not None and max(counts) > most:
            raise ConfigError(f"source {counts.index(max(counts))} has {max(counts)} tokens; the model takes {most}")
        real = None
        if min(counts) < max(counts):
            real = torch.arange(max(counts), device=ids.device) < torch.tensor(counts, device=ids.device)[:, None]
        made = self.module.get_encoder()(**given(input_ids=ids, attention_mask=real), return_dict=True)
        return Encoded(made.last_hidden_state, real)

    def example_codes(self, rows: int) -> Encoded:
        """Some codes of the right width, for a trial."""
        decoder = self.module.get_decoder().get_input_embeddings()
        width = self.bridge.in_features if isinstance(self.bridge, nn.Linear) else decoder.embedding_dim
        where = self.module.device
        return Encoded(torch.randn(rows, 4, width, generator=torch.Generator().manual_seed(0)).to(where))

    def _source(self, codes: Codes | None) -> Encoded:
        values, mask = getattr(codes, "values", None), getattr(codes, "mask", None)
        if values is None:
            raise ConfigError("HFSeq2Seq needs the source's tokens: codes are not given or hold none")
        return Encoded(self.bridge(values).to(self.module.dtype), mask)

    def _arguments(self, ids: Tensor | None, embeds: Tensor | None, mask: Any, source: Any) -> dict[str, Any]:
        from transformers.modeling_outputs import BaseModelOutput

        return given(
            decoder_input_ids=ids,
            decoder_inputs_embeds=embeds,
            decoder_attention_mask=mask,
            encoder_outputs=BaseModelOutput(last_hidden_state=source.values),
            attention_mask=source.mask,
        )

    def forward(self, codes: Codes | None, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B,T,V]; padding may stand on either side.

        Args:
            codes: The source's tokens, from ``encode`` or another encoder.
            tokens: [B,T] int64.
            mask: [B,T] bool, True = real; None: no padding.
        """
        shifted, _, back = left_aligned(tokens, mask, "row")
        arguments = self._arguments(shifted, None, None, self._source(codes))
        logits = self.module(**arguments, use_cache=False, return_dict=True).logits
        return logits if back is None else logits.gather(1, back[:, :, None].expand(-1, -1, logits.shape[2]))
