"""One forward pass with hooks that only read: several sites at once, and no layer above the last of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quire.contracts import Batch
from quire.errors import ConfigError
from quire.roles.sites import attention
from quire.roles.sites.anatomy import Place, slices

if TYPE_CHECKING:
    from quire.roles.sites.subject import Subject


@dataclass
class Reading:
    """What was read, by site.

    Attributes:
        values: [B,T,D]; at a ``heads`` site [B,T,H,D].
        grads: The same shapes: derivative of the subject's summed loss.
        patterns: [B,H,T,T] at ``z`` and ``heads`` sites.
        attended: [B,T,H_kv,d_h], values before they are mixed.
        output: Logits of a language model, where they were asked for.
        loss: The subject's loss, where gradients were.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    grads: dict[str, Tensor] = field(default_factory=dict)
    patterns: dict[str, Tensor] = field(default_factory=dict)
    attended: dict[str, Tensor] = field(default_factory=dict)
    output: Any = None
    loss: Tensor | None = None


class _Enough(Exception):
    """Every wanted site has been read: the layers above needn't run."""


class Watch:
    """The hooks of one reading pass.

    Args:
        places: What is read.
        grad: Make each site a tensor that gradients can be taken of.
        stop: End the pass at the last site.
        attended: Catches fused attention calls; None: patterns aren't wanted.
    """

    def __init__(self, places: list[Place], grad: bool, stop: bool, attended: attention.Attended | None) -> None:
        self.places, self.grad, self.stop, self.attended = places, grad, stop, attended
        self.live: dict[str, Tensor] = {}
        self.found = Reading()

    @contextlib.contextmanager
    def hooked(self) -> Any:
        """Hooks on, hooks off whatever happens."""
        handles: list[Any] = []
        try:
            for place in self.places:
                if place.side == "input":
                    handles.append(place.module.register_forward_pre_hook(self._before(place), with_kwargs=True))
                else:
                    handles.append(place.module.register_forward_hook(self._after(place)))
                if place.also is not None:
                    handles.append(place.also.register_forward_pre_hook(self._before(place, True), with_kwargs=True))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, place: Place, beside: bool = False) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if place.site in self.live:
                return None
            if beside and self.grad:
                raise ConfigError(whole_block(place.site, "differentiated"))
            x = args[0] if args else next(iter(kwargs.values()))
            new = self._take(place, x, x)
            if new is x:
                return None
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): new})

        return hook

    def _after(self, place: Place) -> Any:
        def hook(module: Any, args: tuple[Any, ...], out: Any) -> Any:
            if place.site in self.live:
                return None
            x = first(out)
            seen = per_head(place, args[0]) if place.side == "heads" else x
            new = self._take(place, x, seen)
            return None if new is x else with_first(out, new)

        return hook

    def _take(self, place: Place, x: Tensor, seen: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise ConfigError(f"site {place.site} gives a {type(x).__name__}, not a tensor: choose another")
        if self.grad and not x.requires_grad:
            shown = x is seen
            x = x.detach().requires_grad_(True)
            seen = x if shown else seen
        self.live[place.site] = x
        self.found.values[place.site] = seen.detach()
        if self.attended is not None and place.heads:
            call = self.attended.latest
            if call is None:
                raise ConfigError(
                    f"site {place.site} has no pattern: its attention runs in a kernel of its own; load the subject"
                    " with attn_implementation: sdpa or eager"
                )
            self.found.patterns[place.site] = attention.pattern(call, place.heads).detach()
            self.found.attended[place.site] = attention.values(call, place.heads, place.values).detach()
        if self.stop and len(self.live) == len(self.places):
            raise _Enough
        return x


def read(subject: Subject, places: list[Place], batch: Batch, grad: bool, pattern: bool, output: bool) -> Reading:
    """One pass over an aligned batch; see ``Sites.read``."""
    caught = attention.Attended() if pattern else None
    watch = Watch(places, grad, not (grad or output), caught)
    mode: Any = torch.enable_grad() if grad else torch.no_grad()
    subject.hold_still()
    with torch.inference_mode(False), mode, watch.hooked(), caught or contextlib.nullcontext():
        batch = {k: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for k, v in batch.items()}
        try:
            if grad:
                loss, watch.found.output = subject.loss(batch)
            else:
                watch.found.output = subject.run(batch)
        except _Enough:
            pass
        missed = [p.site for p in places if p.site not in watch.live]
        shape = getattr(batch.get("tokens"), "shape", None)
        for site, x in watch.found.values.items():
            if shape is not None and x.ndim == 2 and len(x) == shape.numel():  # OPT runs its feed-forward on flat rows
                watch.found.values[site] = x.unflatten(0, shape)
        if missed:
            raise ConfigError(f"site {missed[0]} was not reached by a forward pass of subject {subject.name}")
        if grad:
            _differentiate(watch, loss)
    return watch.found


def _differentiate(watch: Watch, loss: Tensor) -> None:
    """One backward pass to every site; the subject's parameters get no gradient."""
    found, tensors = watch.found, [watch.live[p.site] for p in watch.places]
    for place, tensor, g in zip(watch.places, tensors, torch.autograd.grad(loss, tensors, allow_unused=True)):
        g = torch.zeros_like(tensor) if g is None else g
        if place.side == "heads":  # every head adds to the same sum
            g = g.unsqueeze(-2).expand(found.values[place.site].shape)
        found.grads[place.site] = g.detach().view(found.values[place.site].shape)
    found.loss = loss.detach()
    found.output = found.output.detach() if isinstance(found.output, Tensor) else found.output


def first(out: Any) -> Any:
    """The hidden states of what a module returns: the tensor itself, or a tuple's first."""
    if isinstance(out, (tuple, list)):
        return out[0]
    return getattr(out, "last_hidden_state", getattr(out, "values", out)) if not isinstance(out, Tensor) else out


def with_first(out: Any, new: Tensor) -> Any:
    """``out`` with its hidden states replaced."""
    if isinstance(out, Tensor):
        return new
    if isinstance(out, (tuple, list)):
        return type(out)((new, *out[1:]))
    raise ConfigError(f"a module that returns {type(out).__name__} can be read, not changed: choose a module inside it")


def per_head(place: Place, z: Tensor) -> Tensor:
    """[B,T,H,D]: what each head adds, without the bias."""
    parts = z.unflatten(-1, (place.heads, -1))
    return torch.einsum("...hd,hdm->...hm", parts, slices(place.module, place.heads).to(z.dtype))


def whole_block(site: str, what: str) -> str:
    """Why a site of one of our token encoders can be read alone."""
    return f"site {site} can't be {what}: padding, context or rotary positions run its block in pieces; it can be read"


def bring_back(values: Iterable[tuple[str, Tensor]], back: Tensor | None, axes: tuple[int, ...]) -> dict[str, Tensor]:
    """Each tensor with its token axes as they were before rows were aligned."""
    out = {}
    for site, x in values:
        for axis in axes if back is not None else ():
            assert back is not None
            shape = [1] * x.ndim
            shape[0], shape[axis] = back.shape
            x = x.gather(
                axis, back.view(shape).expand([back.shape[1] if a == axis else n for a, n in enumerate(x.shape)])
            )
        out[site] = x
    return out
