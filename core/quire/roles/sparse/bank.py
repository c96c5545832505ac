"""Several dictionaries trained at once on the same batches: a sweep that pays for the subject model once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from quire.contracts import Batch, Losses, Objective, Part, Spec, build
from quire.data import mix
from quire.errors import ConfigError
from quire.roles.sparse.dead import count
from quire.roles.sparse.decoder import SparseDecoder
from quire.roles.sparse.encoder import SparseEncoder
from quire.roles.sparse.objective import SparseReconstruction
from quire.roles.sparse.rows import project, renormalise
from quire.roles.sparse.selector import tiny_run
from quire.roles.sparse.start import start

if TYPE_CHECKING:
    from quire.model import Model

STACKED = ("encoder.W_enc", "encoder.b_enc", "encoder.b_dec", "decoder.W_dec", "decoder.b_dec")


class BankMember(Part):
    """One dictionary of a ``DictionaryBank``.

    Args:
        encoder: Its encoder with its selector.
        decoder: Its decoder; null is a plain SparseDecoder.
        objective: Its loss; null is a plain SparseReconstruction.
        site: Which of the data's sites it reads; null is the first.
        seed: Seed of its start.
    """

    parts: dict[str, Any]

    def __init__(
        self,
        encoder: SparseEncoder,
        decoder: SparseDecoder | None = None,
        objective: SparseReconstruction | None = None,
        site: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.site, self.seed = site, seed
        made = (encoder, decoder or SparseDecoder(), objective or SparseReconstruction())
        self.refer("parts", dict(zip(("encoder", "decoder", "objective"), made)))  # in the bank once it is built

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """As the bank's."""
        return DictionaryBank.tiny()


class _Seat:
    """What a member sees as its model."""

    def __init__(self, member: BankMember, model: Model) -> None:
        self.encoder, self.decoder, self._model = member.parts["encoder"], member.parts["decoder"], model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class DictionaryBank(Objective):
    """Train several dictionaries side by side; parameters have a leading axis of members, W_enc [M,F,D] for one.

    Members may differ in site, seed, selector and loss, not in their sizes. Each trains as it would alone; the loss is
    the sum over members. ``member(i)`` gives a trained one as a Model of its own.

    Args:
        members: The dictionaries.

    Returns:
        Each member's terms, named ``0.reconstruct``, ``1.reconstruct``…

    Raises:
        ConfigError: no members, members of different sizes, or a site that the data does not have.
    """

    fields = ("activation",)

    def __init__(self, members: list[BankMember]) -> None:
        super().__init__()
        if not members:
            raise ConfigError("DictionaryBank needs at least one member")
        self.members = nn.ModuleList(members)
        self.weights = {}

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Two dictionaries on planted features, of k 1 and 2."""

        def member(k: int) -> dict[str, Any]:
            selector = {"class_path": "TopK", "init_args": {"k": k}}
            encoder = {"class_path": "SparseEncoder", "init_args": {"latents": 24, "selector": selector}}
            return {"class_path": "BankMember", "init_args": {"encoder": encoder}}

        run = tiny_run("ReLU")
        bank = {"class_path": "DictionaryBank", "init_args": {"members": [member(1), member(2)]}}
        kept = {k: v for k, v in run["model"].items() if k in ("optimizer", "schedule")}
        return {**run, "model": {**kept, "objective": bank}}

    # ---- life
    def build(self, spec: Spec) -> None:
        """Build each member from its own seed, then keep all weights in common tensors."""
        for member in self._members():
            encoder, decoder, objective = member.parts.values()
            sizes = self._sizes(spec, member)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(member.seed)
                build(encoder, sizes)
                build(decoder, Spec({**sizes, "codes": encoder.sizes()}))
            build(objective, sizes)
            decoder.bind(_Seat(member, self))  # type: ignore[arg-type]
            for name, part in member.parts.items():
                part.callbacks = list  # the bank does their work
                member.add_module(name, part)
        self._stack(shared=spec.get("target_width") is None)
        self._place()

    def _stack(self, shared: bool) -> None:
        self.stacked: dict[str, str] = {}
        for path in STACKED:
            slot, name = path.split(".")
            found = [member.parts[slot]._parameters.get(name) for member in self._members()]
            shapes = {None if f is None else tuple(f.shape) for f in found}
            if len(shapes) > 1:
                sizes = " and ".join(sorted(map(str, shapes)))
                raise ConfigError(f"members of a DictionaryBank must have the same sizes; {path} has {sizes}")
            if shapes == {None} or (path == "decoder.b_dec" and "encoder.b_dec" in self.stacked and shared):
                continue  # one parameter with the encoder's
            key = path.replace(".", "_")
            self.register_parameter(key, nn.Parameter(torch.stack([f.detach() for f in found])))
            self.stacked[path] = key

    def _sizes(self, spec: Spec, member: BankMember) -> Spec:
        sites = spec.get("sites")
        if member.site is None or (not sites and member.site == spec.get("site")):
            return spec
        if not sites or member.site not in sites:
            have = ", ".join(sites or [str(spec.get("site"))])
            raise ConfigError(f"BankMember.site is {member.site!r}; the data has {have}: add it to data.site")
        return Spec({**spec, "site": member.site, "width": spec["widths"][sites.index(member.site)]})

    def _members(self) -> list[BankMember]:
        return list(self.members)  # type: ignore[arg-type]

    def _place(self) -> None:
        """Give every member its slice of the common tensors."""
        for path, key in self.stacked.items():
            slot, name = path.split(".")
            for member, own in zip(self._members(), getattr(self, key).unbind(0)):
                parts = [member.parts[slot]]
                if path == "encoder.b_dec" and "decoder.b_dec" not in self.stacked:
                    parts.append(member.parts["decoder"])
                for part in parts:
                    part._parameters.pop(name, None)
                    object.__setattr__(part, name, own)

    def bind(self, model: Model) -> None:
        """Introduce each member's parts to each other."""
        for member in self._members():
            member.parts["encoder"].bind(_Seat(member, model))

    def callbacks(self) -> list[Callback]:
        """Unit rows, counters and starts of all members."""
        return [_Upkeep()]

    # ---- use
    def forward(self, model: Model, batch: Batch) -> Losses:
        """All members' terms."""
        self._place()
        joined, weights = Losses({}), {}
        outputs = []
        for i, member in enumerate(self._members()):
            losses = member.parts["objective"](_Seat(member, model), self.batch_of(member, batch))
            for name, value in losses.items():
                joined[f"{i}.{name}"] = value
                weights[f"{i}.{name}"] = member.parts["objective"].weights.get(name, 1.0)
            joined.metrics |= {f"{i}.{name}": metric for name, metric in losses.metrics.items()}
            outputs.append(losses.outputs)
        self.weights = weights
        joined.outputs["members"] = outputs
        return joined

    def batch_of(self, member: BankMember, batch: Batch) -> Batch:
        """The batch as a member reads it: its site's activations and gradients."""
        if member.site is None or f"activation@{member.site}" not in batch:
            return batch
        own = {
            name: batch[f"{name}@{member.site}"] for name in ("activation", "grad") if f"{name}@{member.site}" in batch
        }
        return {**batch, **own}

    def member(self, number: int) -> Model:
        """One dictionary as a Model of its own, with copies of its weights: to export, score or write for others."""
        from quire.contracts import plain
        from quire.model import Model

        member = self._members()[number]
        self._place()
        spec = {k: v for k, v in member.parts["encoder"].built_with.items() if k != "codes"}
        parts: dict[str, Any] = {slot: plain(part) for slot, part in member.parts.items()}
        made = Model(**parts, spec=Spec(spec))
        made.configure_model()
        state = {f"{s}.{n}": v for s, part in member.parts.items() for n, v in part.state_dict().items()}
        for path in STACKED:
            slot, name = path.split(".")
            own = getattr(member.parts[slot], name, None)
            if own is not None:
                state[path] = own.detach().clone()
        made.load_state_dict(state)
        return made.eval()


class _Upkeep(Callback):
    """What StartBias, UnitNormRows and DeadLatents do, for each member."""

    def __init__(self) -> None:
        self._step = -1

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step or batch_idx or trainer.current_epoch:
            return
        bank = pl_module.objective.role(DictionaryBank)
        bank._place()
        for member in bank._members():
            if member.parts["encoder"].init == "median":
                start(member.parts["encoder"], member.parts["decoder"], bank.batch_of(member, batch))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for member, rows, gradient in _rows(pl_module):
            if member.parts["decoder"].unit_norm:
                project(rows, gradient)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        bank = pl_module.objective.role(DictionaryBank)
        found = outputs.get("outputs", {}).get("members", []) if isinstance(outputs, dict) else []
        for member, own in zip(bank._members(), found):
            count(member.parts["decoder"], own["fired"], own["tokens"])
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            for member, rows, _ in _rows(pl_module):
                if member.parts["decoder"].unit_norm:
                    renormalise(rows, mix(pl_module.seed, self._step))


def _rows(pl_module: Any) -> list[tuple[BankMember, Tensor, Tensor | None]]:
    bank = pl_module.objective.role(DictionaryBank)
    whole = bank.decoder_W_dec
    gradients = [None] * len(whole) if whole.grad is None else list(whole.grad.unbind(0))
    return list(zip(bank._members(), whole.detach().unbind(0), gradients))
