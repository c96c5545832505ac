"""The checks that start processes fail on plugins that break them; and no check of the kit is left untested."""

from __future__ import annotations

import pytest
from tests.conformance import test_kit_finds_faults, test_kit_finds_language_faults, test_kit_finds_token_faults
from tests.conformance.healthy import vector_plugin
from tests.conformance.planted import broken, finds

from quire.testing.kit import CHECKS

PROCESSES = ("imports_offline", "fits_in_a_fresh_process", "trains_on_two_processes")

QUICK = """\
import socket


class Anything:
    pass
"""
CAUGHT = QUICK + "\ntry:\n    socket.create_connection(('example.org', 80))\nexcept OSError:\n    pass\n"
REGISTERS = (
    QUICK + "\nfrom quire.plugins import load\n\nload().registry.add('quire_planted_NN.parts.More', 'part', 'more')\n"
)
HOOK = """
from quire import hookimpl


@hookimpl
def quire_components(register):
    register("quire_planted_NN.parts.Anything", "part", "thing")
"""


@pytest.mark.parametrize(
    ("hook", "parts", "words"),
    [
        (HOOK, QUICK, ""),
        (f"import torch\n{HOOK}", QUICK, "imports torch"),
        (HOOK, CAUGHT, "uses the network (example.org)"),
        (f"{CAUGHT}\n{HOOK}", QUICK, "uses the network (example.org)"),
        (HOOK, REGISTERS, "registers More"),
        (HOOK, "import no_such_module\n", "ModuleNotFoundError"),
    ],
    ids=["healthy", "torch", "network", "network in the hooks' module", "registration", "broken module"],
)
def test_it_finds_at_import(tmp_path, monkeypatch, hook, parts, words):
    files = {"__init__.py": hook, "parts.py": parts}
    finds(tmp_path, monkeypatch, files, "imports_offline" if words else "", words, *PROCESSES)


ONLY_ALONE = """\
        if torch.distributed.is_initialized():
            {}["boom"]
        terms = {"rebuild": error}"""
ONLY_BESIDE_THE_KIT = """\
        import sys

        sys.modules["quire.testing.kit"]
        terms = {"rebuild": error}"""


@pytest.mark.parametrize(
    ("new", "checks"),
    [
        (ONLY_ALONE, "trains_on_two_processes"),
        (ONLY_BESIDE_THE_KIT, "fits_in_a_fresh_process trains_on_two_processes"),
    ],
    ids=["one process only", "where something else is imported"],
)
def test_it_finds_in_a_process_of_its_own(tmp_path, monkeypatch, new, checks):
    files = broken(vector_plugin(), ('        terms = {"rebuild": error}', new))
    finds(tmp_path, monkeypatch, files, checks, "KeyError", *PROCESSES)


def test_every_check_of_the_kit_is_broken_by_some_test():
    tested = {"private_modules", "other_plugins", "config_reparses", "config_runs", *PROCESSES}
    for module in (test_kit_finds_faults, test_kit_finds_token_faults, test_kit_finds_language_faults):
        tested |= {name for checks, *_ in module.BROKEN.values() for name in checks.split()}
    assert tested == {check.name for check in CHECKS}
