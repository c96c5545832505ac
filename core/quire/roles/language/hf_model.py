"""What the adapters to transformers share: making the module, what it can do, stepping it over a cache."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quire.contracts import Codes, Spec
from quire.errors import ConfigError
from quire.roles.language.contract import Caps, DecodeState, PrefilledModel
from quire.roles.language.hf_config import fresh_config, read_config, recorded
from quire.roles.language.rows import opening, tree

MASKED = ("sdpa", "eager")  # attention that takes a 4-D mask


class HFModel(PrefilledModel):
    """What the two adapters share; use ``HFCausal`` or ``HFSeq2Seq``."""

    crosses = False

    def __init__(
        self,
        name: str | None = None,
        config: dict[str, Any] | None = None,
        attn_implementation: str = "sdpa",
        dtype: str | None = None,
        cache: str = "full",
    ) -> None:
        super().__init__()
        mine = type(self).__name__
        if (name is None) == (config is None):
            raise ConfigError(
                f"{mine} needs name (a folder or hub name) or config (a dict with model_type), one of them"
            )
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise ConfigError(f"{mine}.dtype is float32, bfloat16 or float16, got {dtype!r}")
        if cache not in ("full", "sliding"):
            raise ConfigError(f"{mine}.cache={cache}: decoding needs a croppable cache; use full or sliding")
        self.attn_implementation, self.dtype, self.cache = attn_implementation, dtype, cache
        self.path: Any = None
        self.config = dict(config or {})
        if name is not None:  # a checkpoint holds the weights, so the config is what rebuilds it
            self.path, self.config = read_config(name, mine)
            what = {"config": self.config, "attn_implementation": attn_implementation, "dtype": dtype, "cache": cache}
            self.init_args = what
        self.module: Any = None
        self._caps: Caps | None = None
        self._layers: str | None = None

    @classmethod
    def of(
        cls, module: nn.Module, cache: str = "full", generation: Any = None, lacks: Mapping[str, str] | None = None
    ) -> Any:
        """Wrap a transformers model as it is: same weights, same mode, same attention.

        Args:
            module: A ``PreTrainedModel`` with a language head.
            cache: As in the class.
            generation: A ``GenerationConfig`` to read end, start and pad tokens from; default the module's.
            lacks: ``caps().lacks`` of an earlier wrapper of the same module, which saves the trial.
        """
        hf: Any = module
        said = generation or hf.generation_config
        dtype = str(hf.dtype).removeprefix("torch.")
        made: Any = cls(None, recorded(hf.config, said), hf.config._attn_implementation, dtype, cache)
        made.train(module.training)._take(hf, said)
        made._caps = None if lacks is None else made._said(dict(lacks))
        return made

    def check(self, model: Any) -> None:
        """Refuse a config that transformers can't read."""
        if self.module is None:
            fresh_config(self.config, Spec(), self)

    def build(self, spec: Spec) -> None:
        """Load or make the module; the data's tokenizer must fit into its vocabulary."""
        if self.module is None:
            self._take(self._made(spec), None)
        said, have = spec.get("vocab_size"), self._decoder_config.vocab_size
        if said is not None and said > have:
            raise ConfigError(
                f"{type(self).__name__} has {have} tokens, the data's tokenizer has {said}: use the model's own"
                " tokenizer (HFTokenizer)"
            )
        most, length = self._positions_max(), spec.get("length")
        if most is not None and length is not None and length - 1 > most:
            raise ConfigError(f"{type(self).__name__} takes {most} positions, the data has length={length}: shorten it")

    def _made(self, spec: Spec) -> Any:
        import transformers

        auto = transformers.AutoModelForSeq2SeqLM if self.crosses else transformers.AutoModelForCausalLM
        how: dict[str, Any] = {"attn_implementation": self.attn_implementation}
        if self.dtype is not None:
            how["dtype"] = getattr(torch, self.dtype)
        config = None if self.path is not None else fresh_config(self.config, spec, self)
        try:
            return auto.from_config(config, **how) if config is not None else auto.from_pretrained(self.path, **how)
        except (ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0].partition(". ")[0]
            if "does not support an attention" in reason:
                reason = f"{reason.split()[0]} has none of that kind, try eager"
            raise ConfigError(
                f"{type(self).__name__}.attn_implementation={self.attn_implementation}: {reason}"
            ) from error
        except OSError as error:
            raise ConfigError(f"{type(self).__name__}: no weights to load at {self.path}") from error

    def _take(self, module: Any, generation: Any) -> None:
        from quire.roles.language.hf_cache import windows_of
        from quire.roles.language.hf_places import places_of

        mine = type(self).__name__
        if bool(module.config.is_encoder_decoder) != self.crosses:
            other = "HFCausal" if self.crosses else "HFSeq2Seq"
            raise ConfigError(f"{mine} does not take {type(module).__name__}: use {other}")
        self.module = module.train(self.training)
        self.generation = generation or module.generation_config
        self._decoder_config = module.get_decoder().config.get_text_config(decoder=True)
        self._windows = windows_of(self._decoder_config, mine)
        parameters = set(inspect.signature(module.forward).parameters)
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._keeps = "logits_to_keep" in parameters
        self._embeds = ("decoder_inputs_embeds" if self.crosses else "inputs_embeds") in parameters
        self._places = places_of(module.get_decoder(), self._decoder_config, parameters)
        if self.cache == "sliding" and self._window is None:
            raise ConfigError(f"{mine}.cache=sliding: {module.config.model_type} has no sliding window; use full")

    @property
    def _window(self) -> int | None:
        return self._windows.get("sliding_attention")

    # ---- capabilities
    def caps(self) -> Caps:
        """By the module's signature and config, and by a small trial of trees and ragged rows on the module itself."""
        if self._caps is None:
            from quire.roles.language.hf_trial import trial

            lacks = self._lacking()
            self._caps = self._said(lacks)  # what the trial may rely on
            self._caps = self._said({**trial(self), **lacks})
        return self._caps

    def _said(self, lacks: dict[str, str]) -> Caps:
        ids = {k: getattr(self.generation, k, None) for k in ("eos_token_id", "pad_token_id", "bos_token_id")}
        eos = ids["eos_token_id"]
        ends = () if eos is None else tuple(int(e) for e in (eos if isinstance(eos, (list, tuple)) else [eos]))
        start = getattr(self.generation, "decoder_start_token_id", None) if self.crosses else None
        return Caps(
            self._decoder_config.vocab_size,
            embeds="embeds" not in lacks,
            tree_mask="tree_mask" not in lacks,
            gather="tree_mask" not in lacks,
            batch="batch" not in lacks,
            positions_max=self._positions_max(),
            eos_ids=ends,
            pad_id=ids["pad_token_id"] if ids["pad_token_id"] is not None else (ends or (0,))[0],
            start_id=start if start is not None else ids["bos_token_id"],
            window=self._window,
            lacks=lacks,
        )

    def _lacking(self) -> dict[str, str]:
        mine, kind = type(self).__name__, self._decoder_config._attn_implementation
        lacks = {} if self._embeds else {"embeds": f"{self.module.config.model_type} takes ids only"}
        if self.cache == "sliding":
            why = f"tree drafts need full-length cache; window is {self._window}"
            return {**lacks, "tree_mask": why, "batch": f"ragged rows need full-length cache; window is {self._window}"}
        if kind not in MASKED:
            why = f"{mine} with {kind} takes no 4-D mask: use attn_implementation=sdpa or a chain drafter"
        elif self._places is None:
            why = f"{self.module.config.model_type} takes no positions of our own: use a chain drafter"
        else:
            return lacks
        return {**lacks, "tree_mask": why, "batch": why}

    def _positions_max(self) -> int | None:
        return getattr(self._decoder_config, "max_position_embeddings", None)

    def iter_layers(self) -> list[nn.Module]:
        """The decoder's layers."""
        return list(self.module.get_submodule(self._layers_name()))

    def _layers_name(self) -> str:
        if self._layers is None:
            decoder, config = self.module.get_decoder(), self._decoder_config
            inside = {id(m) for m in decoder.modules()}
            depth = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
            lists = ((n, m) for n, m in self.module.named_modules() if isinstance(m, nn.ModuleList) and id(m) in inside)
            self._layers = next((name for name, part in lists if len(part) == depth), None)
        if self._layers is None:
            raise ConfigError(f"{type(self).__name__}: the layers of {type(self.module).__name__} were not found")
        return self._layers

    def shallow(self, **how: Any) -> Any:
        """``layers=n``: the decoder's first n layers with the same norm and head."""
        depth, layers = len(self.iter_layers()), how.get("layers")
        if set(how) != {"layers"} or not isinstance(layers, int) or not 1 <= layers <= depth:
            raise ConfigError(f"{type(self).__name__} can be shallow by layers=1..{depth}, got {how}")
        self.caps()
        view, name = _view(self), f"module.{self._layers_name()}"
        part: Any = view
        for step in name.split(".")[:-1]:  # new holders down to the list, the same layers in it
            part._modules[step] = _view(part._modules[step])
            part = part._modules[step]
        part._modules[name.rpartition(".")[2]] = nn.ModuleList(self.iter_layers()[:layers])
        return view

    def embed(self, ids: Tensor) -> Tensor:
        """[…] → […,D], as the decoder itself embeds."""
        return self.module.get_decoder().get_input_embeddings()(ids)

    # ---- stepping
    def open_drafted(self, draft: Tensor, prompt: Tensor, *more: Any, **named: Any) -> DecodeState | None:
        """None over a sliding cache, which may have dropped what a cut needs."""
        return None if self.cache == "sliding" else super().open_drafted(draft, prompt, *more, **named)

    def prefill(
        self, draft: Tensor | None, prompt: Tensor, mask: Tensor | None, codes: Codes | None, max_length: int | None
    ) -> DecodeState:
        """See ``PrefilledModel``."""
        from quire.roles.language.hf_cache import SlotStore, WindowStore

        prompt, counts, at = opening(prompt, mask, draft, self._positions_max())
        if min(counts) < max(counts) and not self.caps().batch:
            raise ConfigError(f"prompts of different lengths: {self.caps().lacks['batch']}")
        config = self._decoder_config
        room = max(max_length or 0, prompt.shape[1] + 1)
        store: Any = (
            WindowStore(config, self._window or 0) if self.cache == "sliding" else SlotStore(config, room, self.crosses)
        )
        state = DecodeState(at[:, -1] + 1, torch.empty(0), store)
        state.extras.update(counts=counts, source=self._source(codes))
        store.point([0] * len(counts), torch.zeros_like(state.lengths), prompt.shape[1])
        keep: dict[str, Any] = {}
        if self._keeps and min(counts) == max(counts):  # the last places of all rows
            keep = {"logits_to_keep": at.shape[1]}
            at = at - at[0, 0]
        elif self._keeps:
            columns, at = at.unique(return_inverse=True)
            keep = {"logits_to_keep": columns}
        logits = self._pass(state, prompt, None, None, keep)
        logits = logits[torch.arange(len(at), device=at.device)[:, None], at].float()
        state.logits = logits[:, 0] if draft is None else logits
        state.extras["cache_bytes"] = store.bytes
        return state

    def step(
        self,
        state: DecodeState,
        ids: Tensor | None,
        embeds: Tensor | None = None,
        parents: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Q slots behind each row's kept ones; see ``StepModel.step``. Even rows and chains need no mask of ours."""
        new = ids if ids is not None else embeds
        assert new is not None
        width = new.shape[1]
        counts: list[int] = state.extras["counts"]
        above = None if parents is None else parents.tolist()
        if above is not None and all(row == list(range(-1, width - 1)) for row in above):
            above = None
        state.cache.point(counts, state.lengths, width)
        if above is None and valid is None and min(counts) == max(counts):
            logits = self._pass(state, ids, embeds, None, {})
        else:
            logits = self._masked(state, ids, embeds, width, above, valid)
        state.pending = width
        state.extras["cache_bytes"] = state.cache.bytes
        return logits.float()

    def _masked(
        self,
        state: DecodeState,
        ids: Tensor | None,
        embeds: Tensor | None,
        width: int,
        above: list[list[int]] | None,
        valid: Tensor | None,
    ) -> Tensor:
        from quire.roles.language.hf_places import seen_slots

        caps, device = self.caps(), state.lengths.device
        for need, wanted in (("tree_mask", above is not None or valid is not None), ("batch", True)):
            if wanted and need in caps.lacks:
                raise ConfigError(caps.lacks[need])
        assert self._places is not None
        depths, ancestors = (torch.arange(width, device=device), None) if above is None else tree(above, device)
        places = state.lengths[:, None] + depths
        if caps.positions_max is not None:
            places = places.clamp(max=caps.positions_max - 1)  # only unused slots can lie beyond
        slots = max(state.extras["counts"]) + width
        seen, keys = seen_slots(state.lengths, places, slots, ancestors, valid)
        with self._places.given(places, keys):
            return self._pass(state, ids, embeds, self._masks(seen, places, keys), self._places.arguments(places))

    def _masks(self, seen: Tensor, places: Tensor, keys: Tensor) -> Any:
        from quire.roles.language.hf_places import additive

        made = {}
        for kind, window in self._windows.items():
            near = seen if window is None else seen & (places[:, :, None] - keys[:, None, :] < window)
            made[kind] = additive(near, self.module.dtype)
        return made if len(made) > 1 else next(iter(made.values()))

    def _pass(
        self, state: DecodeState, ids: Tensor | None, embeds: Tensor | None, mask: Any, more: dict[str, Any]
    ) -> Tensor:
        arguments = {**self._arguments(ids, embeds, mask, state.extras["source"]), **more}
        arguments[self._cache_name] = state.cache.hf
        return self.module(**arguments, use_cache=True, return_dict=True).logits

    def _arguments(self, ids: Tensor | None, embeds: Tensor | None, mask: Any, source: Any) -> dict[str, Any]:
        return given(input_ids=ids, inputs_embeds=embeds, attention_mask=mask)

    def _source(self, codes: Codes | None) -> Any:
        return None

    def example_codes(self, rows: int) -> Codes | None:
        """Codes for a trial; None: it reads no source."""
        return None

    def keep(self, state: DecodeState, chosen: Tensor) -> None:
        """Keep the chosen slots of the last step, in order."""
        picked = [[c for c in row if c >= 0] for row in chosen.tolist()]
        counts: list[int] = state.extras["counts"]
        state.cache.keep(counts, state.lengths, picked, state.pending)
        self._stand(state, [n + len(row) for n, row in zip(counts, picked)])

    def cut(self, state: DecodeState, lengths: Tensor) -> None:
        """Forget the slots from ``lengths`` on."""
        state.cache.cut(state.extras["counts"], lengths.tolist())
        self._stand(state, lengths.tolist())

    def _stand(self, state: DecodeState, counts: list[int]) -> None:
        state.extras["counts"], state.pending = counts, 0
        state.lengths = torch.tensor(counts, device=state.lengths.device)

    def rows(self, state: DecodeState, order: Tensor) -> None:
        """Select rows of everything."""
        state.lengths, state.logits = state.lengths[order], state.logits[order]
        state.extras["counts"] = [state.extras["counts"][i] for i in order.tolist()]
        state.cache.rows(order)
        source = state.extras["source"]
        if source is not None:
            kept = None if source.mask is None else source.mask[order]
            state.extras["source"] = replace(source, values=source.values[order], mask=kept)


def given(**arguments: Any) -> dict[str, Any]:
    """The arguments that are not None."""
    return {k: v for k, v in arguments.items() if v is not None}


def _view(module: Any) -> Any:
    made = copy.copy(module)
    made._modules = dict(module._modules)
    return made
