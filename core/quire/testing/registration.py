"""What is registered is what is there: path, kind, roles; and the tiny run names, builds and trains it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback

from quire.contracts import Component, Decoder, Encoder, Metric, Objective, Part, Sampler, needed_roles
from quire.data import FIELDS, DataModule
from quire.errors import ConfigError
from quire.plugins import load
from quire.testing.assembly import words
from quire.testing.subject import Subject
from quire.testing.trial import needed
from quire.testing.verdict import Fault

BASES: dict[str, type] = {
    "encoder": Encoder,
    "decoder": Decoder,
    "objective": Objective,
    "sampler": Sampler,
    "data": DataModule,
    "callback": Callback,
    "metric": Metric,
    "part": Part,
}


def registered(subject: Subject) -> None:
    """The registered path, kind, roles and batch fields are those of the class."""
    entry, cls = subject.entry, subject.cls
    if f"{cls.__module__}.{cls.__qualname__}" != entry.path:
        raise Fault(
            f"{entry.path} is defined in {cls.__module__} as {cls.__qualname__}: register the path of its definition, "
            "or its checkpoints can't be reloaded"
        )
    private = [part for part in entry.path.split(".") if part.startswith("_")]
    if private:
        raise Fault(f"{entry.path} is public in the private {private[0]}: YAML can't find it there by its short name")
    if not issubclass(cls, BASES[entry.kind]):
        raise Fault(f"{entry.name} is registered as {entry.kind} but is no {BASES[entry.kind].__name__}")
    for name in getattr(cls, "fields", ()):
        unknown = [f for f in name.split("|") if f not in FIELDS]
        if unknown:
            raise Fault(f"{entry.name} reads the batch field {unknown[0]}, which quire.data.FIELDS does not document")
    try:
        needed_roles(cls)
    except ConfigError as error:
        raise Fault(str(error)) from error
    if entry.kind == "part":
        _part_role(subject)
    else:
        _roles(subject)


def _roles(subject: Subject) -> None:
    entry = subject.entry
    has = {base.__name__ for base in subject.cls.__mro__}
    known = {role for e in load().registry if e.kind != "part" for role in e.role}
    missing = sorted(has & known - set(entry.role))
    if missing:
        raise Fault(f"{entry.name} is a {missing[0]} but is registered without that role: add it to register(...)")
    for role in sorted(set(entry.role) - has):
        if not _offers(subject, role):
            raise Fault(f"{entry.name} is registered with the role {role}, which it neither is nor offers by role()")


def _offers(subject: Subject, role: str) -> bool:
    found = next((c for c in _subclasses(Component) if c.__name__ == role), None)
    return found is not None and subject.built().role(found) is not None


def _subclasses(cls: Any) -> Iterator[Any]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _part_role(subject: Subject) -> None:
    entry = subject.entry
    if len(entry.role) != 1:
        raise Fault(f"the part {entry.name} must be registered with one role word, such as 'masking'")
    between = [b.__name__.lower() for b in subject.cls.__mro__ if issubclass(b, Part) and b is not Part]
    word = entry.role[0].replace("-", "").replace("_", "").lower()
    if len(between) > 1 and word not in between:
        raise Fault(f"the part {entry.name} is registered as {entry.role[0]!r} but is a {between[-1]}")


def constructs(subject: Subject) -> None:
    """``tiny()`` is a complete run that parses, builds, and has the component in it."""
    trial = subject.trial
    said = set(words(trial.config))
    if not said & {subject.name, subject.entry.path}:
        raise Fault(f"{subject.name}.tiny() does not name {subject.name}: declare a run that uses it")
    made = trial.made()
    if made.find(subject.cls) is None:
        raise Fault(f"the run of {subject.name}.tiny() names {subject.name} but has no such component in it")


def trains(subject: Subject) -> None:
    """The tiny run trains, validates and runs its callbacks, without the network."""
    needed(lambda: subject.trial.made(), "constructs")
    ran = subject.trial.ran()
    if ran.asked:
        raise Fault(f"the run of {subject.name}.tiny() used the network ({ran.asked[0]}): use embedded data")
