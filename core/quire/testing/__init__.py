"""The conformance kit. One line in a plugin's tests puts every component it registers through the same checks.

    from quire.testing import conformance

    TestConformance = conformance("my-method")

pytest then shows one test a check and component, ``TestConformance::test_gradients[MyEncoder]``. A fault is one
sentence for the plugin's author. A component that rightly breaks a check says so, with the reason::

    class Codebook(Part):
        exempt = {"gradients:*.entries": "moved by running averages, not by gradients"}

The keys are ``check`` or, for gradients, ``gradients:PATTERN`` of parameter names. Checks of whole plugins, of configs
and of registration have no exemptions.

Every YAML file in the plugin's ``configs`` is parsed, and trained for two steps. Its first comment line may say
``(parse only)``: too large or needing a download, so it is not run; or ``(after my-method/tiny)``: that config is
trained first in the same folder. A config or a ``tiny()`` that reads ``$QUIRE_DATA/…`` is run where that path exists,
else skipped.
"""

from __future__ import annotations

from typing import Any

__all__ = ["conformance", "faults"]


def conformance(plugin: str) -> type:
    """A pytest class that runs the kit on one installed plugin; assign it to a name that starts with ``Test``.

    Args:
        plugin: Name of the entry point, as ``quire plugins`` lists it; ``core`` for Quire's own components.

    Raises:
        ConfigError: no such plugin is installed.
    """
    from quire.testing.kit import pytest_class

    return pytest_class(plugin)


def faults(plugin: str, *scopes: str) -> dict[tuple[str, str], str]:
    """What the kit finds wrong, without pytest: (check, component or config) → the fault, empty when all is well.

    Args:
        plugin: As for :func:`conformance`.
        scopes: Some of ``plugin``, ``config`` and ``component``, or names of checks; none means all. The checks of
            ``plugin`` start processes.

    Raises:
        ConfigError: no such plugin is installed, or no such check.
    """
    from quire.testing.kit import find_faults

    found: dict[tuple[str, str], Any] = find_faults(plugin, *scopes)
    return found
