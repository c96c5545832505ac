"""The grammar: Encoder, Decoder, Objective, Sampler, and the Parts inside them.

A component's life is ``__init__(hyperparameters)`` → ``build(spec)`` makes parameters → ``bind(model)``
hands it its siblings → use. ``Model`` drives this; a component never calls it on itself.
"""

from __future__ import annotations

import inspect
from abc import ABCMeta
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

import torchmetrics
from torch import Tensor, nn

from quire.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    from quire.model import Model

Batch: TypeAlias = dict[str, Any]
Role = TypeVar("Role")


class Spec(dict[str, Any]):
    """Sizes of the data, said once: plain scalars, strings and nested lists, by field name.

    What the encoder's codes look like (``Encoder.sizes``) is under ``"codes"`` for those built after it.
    """

    def code(self, key: str, asker: object) -> Any:
        """A size of the encoder's codes, ``width`` for one. Raises ``ConfigError`` when there is no such size."""
        codes = self.get("codes") or {}
        if codes.get(key) is None:
            raise ConfigError(
                f"{type(asker).__name__} needs {key!r} of the encoder's codes, which say {codes or 'nothing'}"
            )
        return codes[key]

    def need(self, key: str, asker: object) -> Any:
        """The value of ``key``. Raises ``ConfigError`` naming who needs it and what there is."""
        if self.get(key) is None:
            known = ", ".join(f"{k}={v}" for k, v in self.items() if not isinstance(v, (list, dict))) or "nothing"
            raise ConfigError(f"{type(asker).__name__} needs {key!r} from the data's spec, which says {known}")
        return self[key]

    def agree(self, key: str, given: Any, asker: object) -> Any:
        """``given`` if the YAML gave one, else the spec's. Raises ``ConfigError`` when both exist and differ."""
        said = self.get(key)
        if given is None:
            return self.need(key, asker)
        if said is not None and said != given:
            raise ConfigError(f"{type(asker).__name__} has {key}={given}, the data has {key}={said}: drop one of them")
        return given


class _Recording(ABCMeta):
    """Keeps the arguments of each construction, so a checkpoint can say how to rebuild it without YAML."""

    @property
    def __signature__(cls) -> inspect.Signature:  # else inspect reports this metaclass' __call__
        full = inspect.signature(cls.__init__)  # type: ignore[misc]
        return full.replace(parameters=list(full.parameters.values())[1:])

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        if isinstance(made, cls) and "init_args" not in made.__dict__:
            signature = inspect.signature(cls.__init__)
            given = dict(signature.bind(made, *args, **kwargs).arguments)
            given.pop(next(iter(signature.parameters)))
            for name, parameter in signature.parameters.items():
                if parameter.kind is parameter.VAR_KEYWORD:
                    given |= given.pop(name, {})
            object.__setattr__(made, "init_args", given)
        return made


class Component(nn.Module, metaclass=_Recording):
    """Anything that YAML can name inside ``model``. Subclass one of the kinds below, not this.

    Attributes:
        fields: Batch fields it reads; ``"image|frames"`` means either.
        requires: Capabilities asked of a sibling, ``{"encoder": {"context"}}``.
        init_args: The arguments it was made with.
        frozen: Whether it stays in eval mode without gradients (set by ``Pretrained``).
    """

    fields: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[Mapping[str, frozenset[str]]] = {}
    init_args: dict[str, Any]
    frozen: bool = False

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """The smallest complete run that uses this component: ``{"model": …, "data": …, "trainer": …}``.

        The conformance kit and the docs are made from it. It must train on two CPU cores in seconds.
        """
        raise ConfigError(f"{cls.__name__} declares no tiny example: add a classmethod tiny()")

    def build(self, spec: Spec) -> None:
        """Make what depends on the data. Called once. The default builds the parts inside, in order."""
        for child in inner(self):
            build(child, spec)

    def bind(self, model: Model) -> None:
        """Receive the model once everything is built. Keep siblings by ``refer``, never as submodules."""
        for child in inner(self):
            child.bind(model)

    def check(self, model: Model) -> None:
        """Raise ``ConfigError`` if ``model``'s parts can't serve this one. Called when Model is made, unbuilt."""

    def callbacks(self) -> list[Callback]:
        """Callbacks that it needs beside it; the user lists none of them."""
        return []

    def role(self, role: type[Role]) -> Role | None:
        """This component, or the one inside it, that has ``role``; None if there is none."""
        return self if isinstance(self, role) else None

    def reads(self, stage: str) -> tuple[str, ...]:
        """Batch fields it reads in ``stage`` (fit, validate, test, predict); ``fields`` unless a stage differs."""
        return self.fields

    def lacks(self, capability: str) -> str:
        """Why a capability is missing, as a phrase; used in refusals."""
        return f"does not offer {capability!r}"

    @property
    def built(self) -> bool:
        """Whether ``build`` has run."""
        return self.__dict__.get("built_with") is not None

    def refer(self, name: str, other: Any) -> None:
        """Keep a plain reference: not a submodule, so not in the state dict and not trained twice."""
        object.__setattr__(self, name, other)

    def train(self, mode: bool = True) -> Component:
        """As in torch; a frozen component stays in eval mode."""
        return super().train(mode and not self.frozen)


def inner(module: nn.Module) -> Iterator[Component]:
    """The nearest components inside ``module``, in order, through containers such as ModuleList."""
    for child in module.children():
        if isinstance(child, Component):
            yield child
        else:
            yield from inner(child)


def build(component: Component, spec: Spec) -> None:
    """Build ``component`` once and remember the spec it was built with."""
    if not component.built:
        component.build(spec)
        object.__setattr__(component, "built_with", Spec(spec))


@dataclass
class Codes:
    """What an encoder returns. Roles subclass it and say the shapes."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields by name."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}


class Encoder(Component):
    """batch → Codes. What is seen becomes code.

    Attributes:
        capabilities: What it can do beyond ``forward``; roles say which words exist.
    """

    capabilities: frozenset[str] = frozenset()

    def sizes(self) -> dict[str, Any]:
        """What the codes look like, for those built after it: at least ``{"width": D}``. Valid once built."""
        return {}

    def layers(self) -> list[nn.Module]:
        """Its layers from input to output, for layer-wise learning-rate decay; empty if it has no such order."""
        return []


class Decoder(Component):
    """Codes → output. Code becomes data space: pixels, logits, positions."""

    capabilities: frozenset[str] = frozenset()


class Losses(dict[str, Tensor]):
    """Named loss terms, each a scalar with a gradient.

    Args:
        terms: Scalars by name; the names appear in the log and in ``Objective.weights``.
        metrics: What else is worth logging: tensors, or functions that are only called on logging steps.
        outputs: What metrics and callbacks may read: logits, reconstructions, masks.
    """

    def __init__(
        self,
        terms: Mapping[str, Tensor],
        metrics: Mapping[str, Tensor | Callable[[], Tensor]] | None = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(terms)
        self.metrics = dict(metrics or {})
        self.outputs = dict(outputs or {})


class Objective(Component):
    """(model, batch) → Losses. The method: decides what the encoder sees and what is asked of it.

    Name the roles you need by annotating the class: ``encoder: TokenEncoder``, ``decoder: StepModel``.

    Attributes:
        weights: Weight of each term in the sum; a missing one counts 1.
        players: More than one name makes ``Model`` optimise by hand, one optimizer each; ``forward`` is then
            called with ``player=name``, and ``parameters_of`` says whose parameters move.
    """

    weights: Mapping[str, float] = {}
    players: ClassVar[tuple[str, ...]] = ()

    def forward(self, model: Model, batch: Batch) -> Losses:
        """The loss terms of one batch."""
        raise NotImplementedError

    def parameters_of(self, model: Model, player: str) -> Iterable[nn.Parameter]:
        """Parameters that ``player`` moves."""
        raise NotImplementedError


class Sampler(Component):
    """(model, batch) → results. Draws from a trained model: text, images, chains, selections, explanations.

    Attributes:
        needs_grad: Whether it differentiates; ``Model`` then runs it outside inference mode.
    """

    needs_grad: ClassVar[bool] = False

    def forward(self, model: Model, batch: Batch) -> Any:
        """Results of one batch: a dict of tensors, or a list with one row per sample."""
        raise NotImplementedError

    def finish(self, model: Model, results: list[Any]) -> Any:
        """The answer over the whole set, given every batch's results in ``index`` order."""
        return results


class Part(Component):
    """A replaceable piece inside a component: masking, selector, drafter, transform, schedule."""

    @classmethod
    def __subclasshook__(cls, other: type) -> Any:  # YAML may name a stand-in for a part of any role
        return True if getattr(other, "stands_in", False) else NotImplemented


class Metric(Component, torchmetrics.Metric):
    """A torchmetrics metric that knows how to read a batch. Lightning aggregates it over batches and ranks."""

    def observe(self, model: Model, batch: Batch, losses: Losses) -> None:
        """Update from one batch of ``validate`` or ``test``. ``losses`` is what the objective returned for it."""

    def sampled(self, model: Model, batch: Batch, results: Any) -> None:
        """Update from one batch of ``predict``. ``results`` is what the sampler returned for it."""


SLOTS: dict[str, type[Component]] = {"encoder": Encoder, "decoder": Decoder, "objective": Objective, "sampler": Sampler}


def needed_roles(cls: type) -> dict[str, type]:
    """``{"encoder": TokenEncoder}`` from the class annotations of a component, callback or metric."""
    found: dict[str, type] = {}
    for base in reversed(cls.__mro__):
        if base in (Component, nn.Module) or base.__module__.startswith(("torch", "lightning")):
            continue
        module = inspect.getmodule(base)
        for name, annotation in inspect.get_annotations(base).items():
            if name in SLOTS:
                role = getattr(module, annotation, None) if isinstance(annotation, str) else annotation
                if not isinstance(role, type):
                    if "|" in str(annotation) or "Union[" in str(annotation):
                        raise ConfigError(
                            f"{base.__name__}.{name} is annotated {annotation}: name one role; where any will do name "
                            f"{SLOTS[name].__name__}, and refuse the others in check()"
                        )
                    raise ConfigError(f"{base.__name__}.{name} needs a role that {base.__module__} does not import")
                found[name] = role
    return found


def plain(component: Component) -> dict[str, Any]:
    """``{"class_path": …, "init_args": …}``, nested, of plain values only: what a checkpoint keeps."""
    cls = type(component)
    what: dict[str, Any] = {"class_path": f"{cls.__module__}.{cls.__qualname__}"}
    what["init_args"] = {k: _plain(v, f"{cls.__name__}.{k}") for k, v in component.init_args.items()}
    origin = component.__dict__.get("origin")
    if origin is not None:
        what["pretrained"] = origin
    return what


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, Component):
        return plain(value)
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):  # a subclass, such as numpy.float64, would be pickled by name
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v, where) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v, where) for v in value]
    if hasattr(value, "__fspath__"):
        return str(value)
    raise ConfigError(
        f"{where} is a {type(value).__name__}, which a checkpoint can't keep: pass plain values or components"
    )
