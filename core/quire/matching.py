"""What fits what: the roles and capabilities that components declare, checked before anything is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.contracts import SLOTS, Component, needed_roles
from quire.errors import ConfigError
from quire.plugins import load

if TYPE_CHECKING:
    from quire.model import Model


def origin(cls: type) -> str:
    """The plugin a class comes from, ``core`` for Quire's own, else its top package."""
    entry = load().registry.by_path(f"{cls.__module__}.{cls.__qualname__}")
    top = cls.__module__.partition(".")[0]
    return entry.plugin if entry else "core" if top == "quire" else top


def refusal(needer: type, slot: str, given: Component | None) -> str | None:
    """Why ``given`` in ``model.<slot>`` can't serve ``needer``, as one sentence; None if it can."""
    role = needed_roles(needer).get(slot)
    holder = given if role is None or given is None else given.role(role)  # it may lie inside a wrapper
    if role is not None and holder is None:
        return _no_role(needer, slot, role, None if given is None else type(given))
    return _no_capability(needer, slot, holder)


def asks(needer: type, slot: str) -> bool:
    """Whether ``needer`` names a role or a capability of what is in ``slot``."""
    return slot in needed_roles(needer) or bool(getattr(needer, "requires", {}).get(slot))


def class_refusal(needer: type, slot: str, given: type) -> str | None:
    """The same for classes, nothing built: what ``quire matrix`` prints."""
    role = needed_roles(needer).get(slot)
    entry = load().registry.by_path(f"{given.__module__}.{given.__qualname__}")
    declared = entry is not None and role is not None and role.__name__ in entry.role  # it may hold one inside
    if role is not None and not issubclass(given, role) and not declared:
        return _no_role(needer, slot, role, given)
    return _no_capability(needer, slot, given) or _no_data(needer, given)


def _no_data(needer: type, given: type) -> str | None:
    """No kind of data has what both read, as far as the classes say it."""
    reads = [_fields(part) for part in (needer, given)]
    offers = [_fields(entry.load()) for entry in load().registry if entry.kind == "data"]
    if not all(reads) or any(all(has(offered, w) for w in (*reads[0], *reads[1])) for offered in offers):
        return None
    asked = [" and ".join(r).replace("|", " or ") for r in reads]
    return f"{needer.__name__} reads {asked[0]}, {given.__name__} reads {asked[1]}: no installed data offers both"


def _fields(part: type) -> tuple[str, ...]:
    found = getattr(part, "fields", ())
    return found if isinstance(found, tuple) else ()


def has(offered: tuple[str, ...], wanted: str) -> bool:
    """Whether a field, or one of ``a|b``, is offered."""
    return any(name in offered for name in wanted.split("|"))


def _no_role(needer: type, slot: str, role: type, given: type | None) -> str:
    have = "is not set" if given is None else f"is {given.__name__} ({origin(given)})"
    installed = load().registry.providing(role.__name__)
    listed = f". {role.__name__}s installed: {', '.join(installed)}" if installed else ""
    advice = getattr(role, "advice", "")
    return f"{needer.__name__} needs a {role.__name__}; model.{slot} {have}{advice and ': ' + advice}{listed}"


def _no_capability(needer: type, slot: str, given: Component | type | None) -> str | None:
    for capability in sorted(getattr(needer, "requires", {}).get(slot, ())):
        if given is None:
            return f"{needer.__name__} needs {capability!r} of model.{slot}, which is not set"
        if capability not in getattr(given, "capabilities", ()):
            name = given.__name__ if isinstance(given, type) else type(given).__name__
            lacks = "does not offer it" if isinstance(given, type) else given.lacks(capability)
            return f"{needer.__name__} needs {capability!r}; {name} {lacks}"
    return None


def check_model(model: Model) -> None:
    """Raise ``ConfigError`` for the first part of ``model`` that another part can't work with."""
    for part in model.components():
        for slot in SLOTS:
            said = refusal(type(part), slot, getattr(model, slot))
            if said:
                raise ConfigError(said)
        part.check(model)


def check_fields(model: Model, offered: tuple[str, ...], source: str, stage: str) -> None:
    """Raise ``ConfigError`` when a part that ``stage`` uses reads a field that the data module does not offer."""
    unused = ("objective",) if stage == "predict" else ("sampler",)
    idle = {id(m) for slot in unused if (part := getattr(model, slot)) is not None for m in part.modules()}
    for part in model.components():
        for wanted in part.reads(stage) if id(part) not in idle else ():
            if not has(offered, wanted):
                either = wanted.replace("|", " or ")
                raise ConfigError(
                    f"{type(part).__name__} reads the field {either}; {source} offers {', '.join(offered) or 'none'}"
                )
