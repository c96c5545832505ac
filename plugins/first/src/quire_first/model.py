"""The wrapper: routers decide at prefill which layers a prompt's tokens run. After Jain et al. 2024."""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quire.contracts import Batch, Codes, Decoder, Role, Spec, build
from quire.errors import ConfigError
from quire.roles.language.contract import Caps, DecodeState, StepModel, device_of
from quire.roles.language.rows import left_aligned, select
from quire_first import groups
from quire_first.gates import Stack
from quire_first.lora import adapt
from quire_first.passes import Deciding, Given, on_of, prompt_mask
from quire_first.routing import Routers, Routing, check_routing

PREFILLS = ("skip", "full")
BATCHES = ("union", "group", "vote")
RECENT = 4096


class RoutedModel(StepModel):
    """Any language model, with routers that pick once a prompt the layers its tokens run. After FiRST (reconstruction).

    Jain, Sharma, Mukherjee, Pal, 2024, arXiv 2410.12513. A router reads what its layer is given, over the prompt alone
    (an encoder-decoder: over the source), so the answer takes no part. Skipped layers hold no keys or values.

    Args:
        base: A StepModel with ``iter_layers()``: CausalLM, Seq2SeqDecoder, HFCausal, HFSeq2Seq, UniversalDecoder.
        threshold: A layer runs where its router's probability reaches this, in (0, 1).
        pooling: ``mean`` over the prompt's tokens, ``last_token``, or ``majority`` of the tokens' votes.
        gate: In training ``ste`` (hard, straight-through), ``soft``, or ``gumbel``; decoding is always hard.
        protected: Layers that always run, from the front or (negative) the back.
        prefill: ``skip`` routes the prompt's tokens too, as in training; ``full`` runs all layers on the prompt.
        batch: Rows that disagree: ``union`` runs a layer that any row needs, ``group`` steps rows of one routing
            together; both are exact. ``vote`` lets the mean decide for all rows: the result depends on the batch.
        init: Probability to run before training, in (0, 1).
        force: Skip exactly these layers, whatever the routers say; ``[]`` skips none; null routes.
        lora: Adapters inside the layers, written by ``RoutedLoRA``; null has none.

    Needs:
        encoder: What ``base`` needs.

    Returns:
        ``forward(codes, tokens [B,T], mask [B,T]) -> logits [B,T,V]`` of all layers but the forced ones;
        ``routed`` skips by the routers.

    Raises:
        ConfigError: an argument out of range, a base without layers, layers that share keys and values.
    """

    stack: Stack
    _movable: set[int]

    def __init__(
        self,
        base: Decoder,
        threshold: float = 0.5,
        pooling: str = "mean",
        gate: str = "ste",
        protected: list[int] | None = None,
        prefill: str = "skip",
        batch: str = "union",
        init: float = 0.9,
        force: list[int] | None = None,
        lora: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_routing("RoutedModel", threshold, pooling, gate, init)
        for key, value, known in (("prefill", prefill, PREFILLS), ("batch", batch, BATCHES)):
            if value not in known:
                raise ConfigError(f"RoutedModel.{key} is {', '.join(known)}; got {value!r}")
        found = base.role(StepModel)  # type: ignore[type-abstract]
        if found is None:
            raise ConfigError(f"RoutedModel.base is {type(base).__name__}, which can't be stepped: use a StepModel")
        if getattr(found, "cache", None) == "sliding":
            raise ConfigError(
                "RoutedModel needs a full-length cache, where a layer may be empty: set base.cache to full"
            )
        self.base, self.threshold, self.pooling, self.gate, self.prefill = base, threshold, pooling, gate, prefill
        self.batch, self.initial, self.force, self.lora = batch, init, force, lora
        self.protected = [0, -1] if protected is None else list(protected)
        self.recent: deque[Routing] = deque(maxlen=RECENT)

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A small language model on digit strings, its routers trained."""
        return tiny_routed({"class_path": "RouterTraining"})

    # ---- life
    def check(self, model: Any) -> None:
        """Refuse a layer-less base before anything is built, where it can be known."""
        if type(self._inside).iter_layers is StepModel.iter_layers:
            kind = type(self._inside).__name__
            raise ConfigError(f"RoutedModel: {kind} exposes no layers; implement iter_layers()")

    def build(self, spec: Spec) -> None:
        """The base, then one router for each layer that is not protected."""
        build(self.base, spec)
        self.check(None)
        stack = Stack(self._inside, list(self._inside.iter_layers()))
        count = len(stack.layers)
        self.depth = count
        kept = sorted({self._place(i, "protected") for i in self.protected})
        free = [i for i in range(count) if i not in kept]
        if not free:
            raise ConfigError(
                f"RoutedModel: all {count} layers are protected, so none can be skipped: shorten protected"
            )
        self.kept = kept
        self.crosses = bool(getattr(self._inside, "crosses", False))
        self.refer("stack", stack)
        self._check_force(self.force)
        width = (spec.get("codes") or {}).get("width") if self.crosses else None
        if width is None:
            width = self._inside.embed(torch.zeros(1, 1, dtype=torch.long, device=device_of(self._inside))).shape[-1]
        self.routers = Routers(free, int(width), self.initial, self.pooling, self.gate, self.threshold)
        self.routers.to(device_of(self._inside))
        if self.lora is not None:
            adapt(stack.layers, **self.lora)

    def bind(self, model: Any) -> None:
        """The model's generator draws gumbel's noise."""
        super().bind(model)
        self.refer("_chance", model.generator)

    def adapt(self, **how: Any) -> None:
        """Put adapters into the layers, once; ``init_args`` says so, so that a checkpoint rebuilds them.

        Args:
            how: ``rank``, ``alpha``, ``modules``, ``dropout``, as ``quire_first.lora.adapt``.
        """
        if self.lora is not None:
            if self.lora != how:
                raise ConfigError(f"RoutedModel has adapters {self.lora} already; asked for {how}: make them agree")
            return
        adapt(self.stack.layers, **how)
        self.lora = how
        self.init_args = {**self.init_args, "lora": how}

    def role(self, role: type[Role]) -> Role | None:
        """Itself, or what lies in the base."""
        return self if isinstance(self, role) else self.base.role(role)

    @property
    def _inside(self) -> StepModel:
        found = self.base.role(StepModel)  # type: ignore[type-abstract]
        assert found is not None
        return found

    def _place(self, layer: int, key: str) -> int:
        if not -self.depth <= layer < self.depth:
            last = self.depth - 1
            raise ConfigError(f"RoutedModel.{key} names layer {layer}; {type(self._inside).__name__} has 0 to {last}")
        return layer % self.depth

    def _check_force(self, force: list[int] | None) -> None:
        for layer in force or []:
            if self._place(layer, "force") in self.kept:
                raise ConfigError(f"RoutedModel.force skips layer {layer}, which is protected: change protected")

    def forced(self) -> Tensor | None:
        """[N] bool, layers that run under ``force``; None when the routers decide."""
        if self.force is None:
            return None
        self._check_force(self.force)
        on = torch.ones(self.depth, dtype=torch.bool)
        on[[self._place(i, "force") for i in self.force]] = False
        return on

    # ---- what a step model is
    def caps(self) -> Caps:
        """The base's."""
        return self._inside.caps()

    def encode(self, batch: Batch) -> Codes | None:
        """The base's own encoder, if it has one."""
        return self._inside.encode(batch)

    def embed(self, ids: Tensor) -> Tensor:
        """As the base."""
        return self._inside.embed(ids)

    def iter_layers(self) -> list[nn.Module]:
        """The base's."""
        return self.stack.layers

    def shallow(self, **how: Any) -> StepModel:
        """``routed=True``: a routed pass, drafting for the full model (``force: []``); else as the base."""
        if set(how) != {"routed"} or how["routed"] is not True:
            return self._inside.shallow(**how)
        if self.force is None:
            raise ConfigError(
                "SelfDraft(routed) drafts for the full model, and this RoutedModel skips layers itself: set force: []"
            )
        view = copy.copy(self)
        view._modules = dict(self._modules)
        view.force = None
        view.recent = deque(maxlen=1)
        return view

    # ---- training
    def forward(self, codes: Codes | None, tokens: Tensor, mask: Tensor | None = None, **extra: Any) -> Tensor:
        """Logits [B,T,V] with every layer but the forced ones; the routers are not asked, since no prompt is named."""
        on = self.forced()
        self.caps()
        if on is None or bool(on.all()):
            return self._inside(codes, tokens, mask, **extra)
        with self.stack.standing(self.stack.plan(on[None])[0]):
            return self._inside(codes, tokens, mask, **extra)

    def routed(
        self,
        codes: Codes | None,
        tokens: Tensor,
        mask: Tensor | None = None,
        prompt_length: Tensor | None = None,
        on: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """Logits [B,T,V] with layers skipped row by row, and what was skipped.

        Args:
            codes: The source's codes, for an encoder-decoder model.
            tokens: [B,T] int64.
            mask: [B,T] bool, True = real; None: no padding.
            prompt_length: [B] real tokens that the routers read; not needed with a source.
            on: [B,N] bool, a routing to follow; None asks ``force``, then the routers.
        """
        shifted, counts, back = left_aligned(tokens, mask, "row")
        real = torch.arange(tokens.shape[1], device=tokens.device) < torch.tensor(counts, device=tokens.device)[:, None]
        chosen = self._pass(codes, len(tokens), on, self.training and torch.is_grad_enabled())
        if isinstance(chosen, Deciding) and chosen.prompt is None:
            chosen.prompt = prompt_mask(prompt_length, counts, real)
        with self.stack.standing(self.stack.gates(chosen, self._free(chosen))):
            logits = self._inside(codes, shifted, None if mask is None else real)
        if back is not None:
            logits = logits.gather(1, back[:, :, None].expand(-1, -1, logits.shape[2]))
        return logits, self._noted(chosen)

    def _free(self, chosen: Deciding | Given) -> list[int]:
        return list(range(self.depth)) if isinstance(chosen, Given) else list(self.routers.place)

    def _noted(self, chosen: Deciding | Given) -> Routing:
        routing = chosen.routing(self.depth)
        self.recent.append(Routing(routing.rho.detach(), routing.on))
        return routing

    def _pass(self, codes: Codes | None, rows: int, on: Tensor | None, learning: bool) -> Deciding | Given:
        device = self.routers.weight.device
        self.caps()  # an adapter tries itself out here, which must not meet the gates
        if on is None and (forced := self.forced()) is not None:
            on = forced.expand(rows, -1)
        if on is not None:
            return Given(on.to(device))
        chance = self.__dict__.get("_chance")
        learning = learning and self.routers.weight.requires_grad
        made = Deciding(self.routers, learning, None if chance is None or not learning else chance(device))
        if self.crosses:
            values, mask = getattr(codes, "values", None), getattr(codes, "mask", None)
            if values is None:
                raise ConfigError("RoutedModel: the routers of an encoder-decoder read its source; no codes are given")
            made.read(values, mask)
        return made

    # ---- stepping
    def open(
        self, prompt: Tensor, mask: Tensor | None = None, codes: Codes | None = None, max_length: int | None = None
    ) -> DecodeState:
        """Prefill, layer by layer; what is decided here holds for every later step."""
        prompt, counts, _ = left_aligned(prompt, mask, "prompt")
        prompt = prompt[:, : max(counts)]
        real = torch.arange(max(counts), device=prompt.device) < torch.tensor(counts, device=prompt.device)[:, None]
        chosen = self._pass(codes, len(prompt), None, False)
        if isinstance(chosen, Deciding):
            chosen.full, chosen.vote = self.prefill == "full", self.batch == "vote"
            chosen.prompt = real if chosen.prompt is None else chosen.prompt
        padding = None if min(counts) == max(counts) else real
        state = self._opened(chosen, prompt, padding, codes, max_length)
        routing = self._noted(chosen)
        state.extras["routing"] = routing = replace(routing, rho=routing.rho.detach().cpu(), on=routing.on.cpu())
        if self.batch == "group" and len(patterns := groups.patterns(routing.on)) > 1:
            parts = []
            for rows in patterns:
                part = None if padding is None else real[rows]
                own = None if codes is None else select(codes, rows, len(prompt))
                again = Given(routing.on[rows].to(real.device), self.prefill == "full")
                made = self._opened(again, prompt[rows], part, own, max_length)
                made.extras["routing"] = Routing(routing.rho[rows], routing.on[rows])
                parts.append((rows, self._planned(made)))
            return groups.joined(parts, routing)
        return self._planned(state)

    def _opened(
        self, chosen: Deciding | Given, prompt: Tensor, mask: Tensor | None, codes: Codes | None, most: int | None
    ) -> DecodeState:
        with self.stack.standing(self.stack.gates(chosen, self._free(chosen))):
            return self._inside.open(prompt, mask, codes, most)

    def _planned(self, state: DecodeState) -> DecodeState:
        state.extras["plan"], ran = self.stack.plan(state.extras["routing"].on)
        state.extras["layers_run"] = state.extras["layers_used"] = float(ran)
        return state

    def step(
        self,
        state: DecodeState,
        ids: Tensor | None,
        embeds: Tensor | None = None,
        parents: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Q slots behind each row's kept ones, through the layers chosen at prefill; see ``StepModel.step``."""
        if groups.grouped(state):
            return groups.step(self, state, ids, embeds, parents, valid)
        with self.stack.standing(state.extras["plan"]):
            logits = self._inside.step(state, ids, embeds, parents, valid)
        state.extras["layers_used"] = state.extras["layers_run"]
        return logits

    def read(self, state: DecodeState, ids: Tensor) -> Tensor:
        """Append a further turn [B,Q] to a running state; the first prompt's decision stays, and a warning says so."""
        on_of(state, warn=True)
        logits = self.step(state, ids)
        self.keep(state, torch.arange(ids.shape[1]).expand(len(ids), -1))
        state.logits = logits[:, -1]
        return logits

    def keep(self, state: DecodeState, chosen: Tensor) -> None:
        """Keep slots of the last step."""
        if groups.grouped(state):
            groups.keep(self, state, chosen)
        else:
            self._inside.keep(state, chosen)

    def cut(self, state: DecodeState, lengths: Tensor) -> None:
        """Forget the slots from ``lengths`` on."""
        if groups.grouped(state):
            groups.cut(self, state, lengths)
        else:
            self._inside.cut(state, lengths)

    def rows(self, state: DecodeState, order: Tensor) -> None:
        """Select rows; layers that only rows now gone had needed stop running."""
        routing: Routing = state.extras["routing"]
        at = order.cpu()
        if groups.grouped(state):
            groups.rows(self, state, order)
            state.extras["routing"] = Routing(routing.rho[at], routing.on[at])
            return
        self._inside.rows(state, order)
        state.extras["routing"] = Routing(routing.rho[at], routing.on[at])
        self._planned(state)

    # ---- what trains
    def trains(self, backbone: bool, routers: bool, adapters: bool) -> None:
        """Say which parameters have gradients; what the base itself keeps frozen stays so."""
        adapted = {id(p) for n, p in self.base.named_parameters() if n.endswith((".down_rank", ".up_rank"))}
        if "_movable" not in self.__dict__:
            movable = {id(p) for p in self.base.parameters() if p.requires_grad and id(p) not in adapted}
            self.refer("_movable", movable)
        for parameter in self.base.parameters():
            wanted = adapters if id(parameter) in adapted else backbone and id(parameter) in self._movable
            parameter.requires_grad_(wanted)
        self.routers.requires_grad_(routers)


def tiny_routed(objective: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A complete small run on digit strings."""
    base = {"class_path": "CausalLM", "init_args": {"width": 32, "depth": 4, "heads": 2}}
    decoder = {"class_path": "RoutedModel", "init_args": {"base": base}}
    sampler = {"class_path": "Greedy", "init_args": {"max_new_tokens": 6}}
    sizes = {"train_length": 4, "test_length": 4, "samples": 64, "batch_size": 16, "causal": True}
    data = {"class_path": "Algorithmic", "init_args": {"task": "copy+reverse", **sizes}}
    return {"model": {"decoder": decoder, "objective": objective, "sampler": sampler, **changes}, "data": data}
