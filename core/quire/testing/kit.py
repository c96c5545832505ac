"""The table of checks, and the two ways to run it: as pytest tests and as a list of faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from quire.errors import ConfigError, QuireError, suggest
from quire.plugins import load
from quire.registry import Entry
from quire.testing import (
    configs,
    docstrings,
    language,
    learning,
    outputs,
    package,
    processes,
    registration,
    saving,
    tokens,
    vectors,
)
from quire.testing.subject import Subject, exemption
from quire.testing.verdict import Fault, Skip

SCOPES = ("plugin", "config", "component")
MODEL = ("encoder", "decoder", "objective", "sampler", "part")


@dataclass(frozen=True)
class Check:
    """One property.

    Attributes:
        run: Takes a plugin's name, a config's name, or a Subject; raises ``Fault`` or ``Skip``.
        scope: Which of these: plugin, config or component.
        kinds: Component kinds it applies to; empty means all.
        role: Role it applies to; empty means all.
        exemptible: Whether a component may give a reason not to keep it.
    """

    run: Callable[[Any], None]
    scope: str = "component"
    kinds: tuple[str, ...] = ()
    role: str = ""
    exemptible: bool = False

    @property
    def name(self) -> str:
        """Name of the function."""
        return self.run.__name__

    def suits(self, entry: Entry) -> bool:
        """Whether it applies to a component."""
        return (not self.kinds or entry.kind in self.kinds) and (not self.role or self.role in entry.role)


CHECKS: tuple[Check, ...] = (
    Check(package.loads, "plugin"),
    Check(package.private_modules, "plugin"),
    Check(package.other_plugins, "plugin"),
    Check(processes.imports_offline, "plugin"),
    Check(processes.fits_in_a_fresh_process, "plugin"),
    Check(processes.trains_on_two_processes, "plugin"),
    Check(configs.config_reparses, "config"),
    Check(configs.config_runs, "config"),
    Check(registration.registered),
    Check(docstrings.documented),
    Check(registration.constructs),
    Check(registration.trains),
    Check(outputs.outputs, kinds=("encoder", "decoder", "objective", "metric", "data"), exemptible=True),
    Check(learning.gradients, kinds=MODEL, exemptible=True),
    Check(learning.learns, kinds=MODEL, exemptible=True),
    Check(learning.repeats, kinds=MODEL, exemptible=True),
    Check(saving.reloads, kinds=MODEL, exemptible=True),
    Check(saving.exports, kinds=MODEL, exemptible=True),
    Check(outputs.predicts, kinds=("encoder", "sampler"), exemptible=True),
    *(Check(run, role="TokenEncoder", exemptible=True) for run in tokens.CHECKS),
    *(Check(run, kinds=("part",), role="masking", exemptible=True) for run in tokens.MASKING),
    *(Check(run, role=role, exemptible=True) for role, runs in vectors.CHECKS.items() for run in runs),
    *(Check(run, role="StepModel", exemptible=True) for run in language.STEP_MODEL),
    *(Check(run, kinds=("part",), role=role, exemptible=True) for role, runs in language.PARTS.items() for run in runs),
)


def targets(plugin: str, check: Check) -> list[str]:
    """What a check runs on: the plugin, names of its configs, or names of its components."""
    if check.scope == "plugin":
        return [plugin]
    if check.scope == "config":
        return [name for name in load().configs() if name.partition("/")[0] == plugin]
    return [e.name for e in load().registry if e.plugin == plugin and check.suits(e)]


def perform(check: Check, target: str) -> None:
    """Run one check on one target. Raises ``Fault``, ``Skip``, or whatever the component's own code raises."""
    if check.scope != "component":
        check.run(target)
        return
    subject = Subject(load().registry.entries[target])
    reason = exemption(subject.cls, check.name) if check.exemptible else None
    if reason is not None:
        if not reason:
            raise Fault(f"{target} is exempt from {check.name} without a reason: give one")
        raise Skip(f"exempt: {reason}")
    check.run(subject)


def _installed(plugin: str) -> None:
    records = load().records
    if plugin not in records:
        raise ConfigError(
            f"no plugin named {plugin} is installed{suggest(plugin, list(records)) or ': pip install it'}"
        )


def find_faults(plugin: str, *scopes: str) -> dict[tuple[str, str], str]:
    """See :func:`quire.testing.faults`."""
    _installed(plugin)
    unknown = sorted(set(scopes) - set(SCOPES) - {c.name for c in CHECKS})
    if unknown:
        raise ConfigError(f"{unknown[0]} is no scope ({', '.join(SCOPES)}) and no check of the kit")
    found = {}
    for check in CHECKS:
        wanted = not scopes or check.scope in scopes or check.name in scopes
        for target in targets(plugin, check) if wanted else ():
            try:
                perform(check, target)
            except Skip:
                continue
            except Exception as error:  # a component's code may raise anything; that is a fault too
                found[check.name, target] = (
                    str(error) if isinstance(error, Fault) else f"{type(error).__name__}: {error}"
                )
    return found


def pytest_class(plugin: str) -> type:
    """See :func:`quire.testing.conformance`."""
    _installed(plugin)
    body: dict[str, Any] = {"__doc__": f"The conformance kit on the plugin {plugin}."}
    body |= dict(_tests(plugin))
    return type("TestConformance", (), body)


def _tests(plugin: str) -> Iterator[tuple[str, Any]]:
    import pytest

    for check in CHECKS:
        names = targets(plugin, check)
        if names:
            yield f"test_{check.name}", pytest.mark.parametrize("target", names)(_test(check))


def _test(check: Check) -> Callable[[Any, str], None]:
    import pytest

    def test(self: Any, target: str) -> None:
        __tracebackhide__ = True
        try:
            perform(check, target)
            return
        except Skip as reason:
            said, skip = str(reason), True
        except (Fault, QuireError) as fault:
            said, skip = str(fault), False
        pytest.skip(said) if skip else pytest.fail(said, pytrace=False)

    test.__name__ = test.__qualname__ = f"test_{check.name}"
    test.__doc__ = check.run.__doc__
    return test
