"""What `make test` leaves out beside the tests that call themselves slow."""

import pytest

TWO_PROCESSES = ("mp3", "universal")  # plugins that `make test` runs on two processes; for the others it is slow


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The kit's run on two processes costs 20 s a plugin, and `tests/faults` has the core's own."""
    for item in items:
        name, _, target = item.name.rstrip("]").partition("[")
        if name == "test_trains_on_two_processes" and target not in TWO_PROCESSES:
            item.add_marker(pytest.mark.slow)
