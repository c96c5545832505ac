"""One tool reads, replaces and steers at a site. Nothing else in Quire hooks a subject."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quire.contracts import Batch
from quire.errors import ConfigError
from quire.roles.sites.anatomy import Anatomy, Place
from quire.roles.sites.reading import Reading, bring_back, first, per_head, read, whole_block, with_first

if TYPE_CHECKING:
    from quire.roles.sites.subject import Subject

Change = Callable[[Tensor], Tensor]


class Sites:
    """Reads and changes a subject inside, at sites named ``blocks.i.resid``, ``blocks.i.z`` or by a module's path.

    ``resid`` is what block i returns and ``resid_pre`` what it gets; ``mlp_out`` and ``attn_out`` are what its two
    parts give, before any norm behind them; ``z`` are the heads side by side before the output projection; ``heads``
    is what each head adds behind it, without the bias. Rows run with their real tokens on the left; what is read comes
    back as the batch had it, while functions that change a site see the aligned rows.

    Args:
        subject: The frozen model.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.anatomy = Anatomy(subject.root, f"subject {subject.name}")
        self._places: dict[str, Place] = {}

    def names(self) -> list[str]:
        """Every named site. Any module's path is one too, and its input with ``:in`` behind the path."""
        return self.anatomy.sites()

    def place(self, site: str) -> Place:
        """The module and side of a site. Raises ``ConfigError`` with the nearest names."""
        if site not in self._places:
            self._places[site] = self.anatomy.place(site)
        return self._places[site]

    def read(
        self, batch: Batch, sites: Sequence[str], grad: bool = False, pattern: bool = False, output: bool = False
    ) -> Reading:
        """Activations at several sites from one forward pass.

        Args:
            batch: What the subject reads: ``tokens`` [B,T] and ``mask`` [B,T], or an encoder's own fields.
            sites: One or more.
            grad: Also the derivative of the summed loss; runs the whole subject.
            pattern: Also attention pattern and values at ``z`` and ``heads`` sites.
            output: Also logits (or codes); else layers above the last site don't run.

        Raises:
            ConfigError: an unknown site, one that the pass never reaches, or no loss to differentiate.
        """
        if not sites:
            raise ConfigError("no site was named: give at least one, such as blocks.0.resid")
        moved, back = self.subject.aligned(batch)
        places = [self.place(s) for s in dict.fromkeys(sites)]
        found = read(self.subject, places, moved, grad, pattern, output)
        if back is not None:
            found.values = bring_back(found.values.items(), back, (1,))
            found.grads = bring_back(found.grads.items(), back, (1,))
            found.patterns = bring_back(found.patterns.items(), back, (2, 3))
            found.attended = bring_back(found.attended.items(), back, (1,))
            if isinstance(found.output, Tensor):
                found.output = bring_back([("output", found.output)], back, (1,))["output"]
        return found

    # ---- changing
    @contextlib.contextmanager
    def replace(self, site: str, change: Change) -> Iterator[None]:
        """Within the block, ``change(x) -> x'`` of the same shape stands for what the site holds.

        Args:
            site: Any site; at ``heads`` ``x`` is [B,T,H,D] and the sum over heads, plus the bias, goes on.
            change: Called once per pass; under a cache it sees the new positions only.
        """
        place = self.place(site)
        done = False

        def changed(x: Tensor) -> Tensor:
            nonlocal done
            done = True
            new = change(x)
            if new.shape != x.shape:
                raise ConfigError(f"site {site} holds {list(x.shape)}, its replacement is {list(new.shape)}")
            return new.to(x.dtype)

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (changed(args[0]), *args[1:]), kwargs
            name = next(iter(kwargs))
            return args, {**kwargs, name: changed(kwargs[name])}

        def after(module: Any, args: tuple[Any, ...], out: Any) -> Any:
            if place.side == "heads":
                heads = per_head(place, args[0])
                return first(out) + (changed(heads) - heads).sum(-2)
            return with_first(out, changed(first(out)))

        def pieces(module: Any, args: Any) -> None:
            if not done:
                raise ConfigError(whole_block(site, "changed"))

        handles: list[Any] = []
        try:
            if place.side == "input":
                handles.append(place.module.register_forward_pre_hook(before, with_kwargs=True))
            else:
                handles.append(place.module.register_forward_hook(after))
            if place.also is not None:
                handles.append(place.also.register_forward_pre_hook(pieces))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def steer(
        self, site: str, direction: Tensor, alpha: float | Tensor = 1.0, since: Tensor | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Add ``alpha`` times a direction at every position; under a cache once per new position.

        Args:
            site: Where.
            direction: [D].
            alpha: In units of the activation; negative is allowed.
            since: [B] int64, first position that is steered in the first pass; later passes are steered whole.
        """
        start = _Start(since)

        def add(x: Tensor) -> Tensor:
            if direction.shape != x.shape[-1:]:
                raise ConfigError(f"direction has width {direction.shape[-1]}; site {site} has width {x.shape[-1]}")
            return start.only(x, x + alpha * direction.to(x))

        return self.replace(site, add)

    def splice(
        self,
        site: str,
        encoder: Any,
        decoder: Any,
        edit: Callable[[Any], Any] | None = None,
        keep_error: bool = True,
        since: Tensor | None = None,
        fields: Mapping[str, Tensor] | None = None,
    ) -> contextlib.AbstractContextManager[None]:
        """Run the site through a dictionary: x + decode(edit(codes)) - decode(codes).

        Codes that ``edit`` leaves alone leave x as it is, bit for bit, since the dictionary's error stays in it.

        Args:
            site: Where.
            encoder: Takes a batch with ``activation`` [N,D], one row a position (and ``head`` at a heads site).
            decoder: Codes → [N,D].
            edit: Codes → codes; rows run position after position, row after row. None: as they are.
            keep_error: False puts decode(edit(codes)) alone in place of x.
            since: As in ``steer``.
            fields: Further fields for the encoder, [B,T,…], such as ``grad``.
        """
        start = _Start(since)

        def through(x: Tensor) -> Tensor:
            rows = x.flatten(0, -2)
            batch = {"activation": rows.float(), **{k: v.flatten(0, x.ndim - 2) for k, v in (fields or {}).items()}}
            if x.ndim == 4:
                batch["head"] = torch.arange(x.shape[2], device=x.device).repeat(x.shape[0] * x.shape[1])
            codes = encoder(batch)
            clean = decoder(codes) if keep_error or edit is None else None
            made = decoder(edit(codes)) if edit is not None else clean
            assert made is not None
            if made.shape[-1] != x.shape[-1]:
                raise ConfigError(f"the dictionary gives width {made.shape[-1]}; site {site} has width {x.shape[-1]}")
            new = rows + (made - clean) if keep_error and clean is not None else made
            return start.only(x, new.view(x.shape).to(x.dtype))

        return self.replace(site, through)

    def ablate(
        self, site: str, heads: Sequence[int] | int, mode: str = "mean", values: Tensor | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Take out heads at a ``z`` or ``heads`` site.

        Args:
            site: ``blocks.i.z`` or ``blocks.i.heads``.
            heads: Numbers of the heads.
            mode: ``zero``; ``mean`` puts ``values`` there, or the mean over this pass without them; ``patch`` puts
                ``values`` there, read in another run.
            values: Broadcast to the site as [B,T,H,d] (d is the head width at ``z``, D at ``heads``).

        Raises:
            ConfigError: another site or mode, a head that isn't there, ``patch`` without values.
        """
        place = self.place(site)
        chosen = [heads] if isinstance(heads, int) else list(heads)
        if not place.heads:
            raise ConfigError(f"site {site} has no heads: ablate at blocks.{max(place.block, 0)}.z")
        for head in chosen:
            if not 0 <= head < place.heads:
                raise ConfigError(f"head {head} is outside site {site}, which has {place.heads} heads")
        if mode not in ("zero", "mean", "patch"):
            raise ConfigError(f"ablate takes mode zero, mean or patch, got {mode!r}")
        if mode == "patch" and values is None:
            raise ConfigError("ablate with mode patch needs values, read from the other run")

        def without(x: Tensor) -> Tensor:
            parts = x.unflatten(-1, (place.heads, -1)) if place.side == "input" else x
            new = parts.clone()
            if mode == "zero":
                new[..., chosen, :] = 0
            else:
                given = parts.flatten(0, 1).mean(0) if values is None else values
                if place.side == "input" and given.shape[-1] == x.shape[-1] and place.heads > 1:
                    given = given.unflatten(-1, (place.heads, -1))
                new[..., chosen, :] = given.to(x).expand_as(parts)[..., chosen, :]
            return new.view(x.shape)

        return self.replace(site, without)


class _Start:
    """Limits a change to positions from ``since`` on in the first pass; later passes hold new positions only."""

    def __init__(self, since: Tensor | None) -> None:
        self.since, self.passes = since, 0

    def only(self, x: Tensor, new: Tensor) -> Tensor:
        """``new`` where it counts, else ``x``."""
        self.passes += 1
        if self.since is None or self.passes > 1:
            return new
        late = torch.arange(x.shape[1], device=x.device) >= self.since.to(x.device)[:, None]
        return torch.where(late.view(*late.shape, *[1] * (x.ndim - 2)), new, x)
