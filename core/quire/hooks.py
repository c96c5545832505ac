"""The hooks that a plugin may implement.

A plugin is a distribution with an entry point in group ``quire`` that names a module. The module holds
functions marked ``@quire.hookimpl`` with the names below, and imports no torch: hooks register *paths*,
so listing everything installed stays fast, and a run imports only what its YAML names.
"""

from __future__ import annotations

from collections.abc import Callable

import pluggy

API = 1
"""Version of the plugin interface. A plugin may set ``QUIRE_API = 1``; another number blocks it."""

hookspec = pluggy.HookspecMarker("quire")
hookimpl = pluggy.HookimplMarker("quire")


@hookspec
def quire_components(register: Callable) -> None:
    """Register components by path.

    ``register(path, kind, role=())``: ``path`` is ``"package.module.ClassName"``, and the class name is the
    short name used in YAML; ``kind`` is one of encoder, decoder, objective, sampler, data, callback, metric,
    part; ``role`` names the roles it provides (``"TokenEncoder"``), for a part the role it plays
    (``"masking"``).
    """


@hookspec
def quire_commands(register: Callable) -> None:
    """Register subcommands of ``quire``.

    ``register(name, path, help)``: ``path`` is ``"package.module.function"``; the function takes the list of
    arguments after the name and returns an exit code or None.
    """


@hookspec
def quire_claims(register: Callable) -> None:
    """Register what ``quire reproduce NAME`` runs.

    ``register(name, path)``: ``path`` is ``"package.module.ClassName"`` of a ``quire.reproduce.Claim``.
    """
