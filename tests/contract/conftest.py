"""Which transports the contract suite runs over, and what every test of it checks without saying so.

SHM and TCP need nothing and run in one process. No two network libraries share one, so each of the others has the same
suite in a process of its own, which `test_library_transports.py` starts, or you:

    pytest tests/contract --transport UCX
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.support.kv_pools import traces

IN_ONE_PROCESS = ("SHM", "TCP")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--transport", help="run what is said of every transport over this one alone")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "transport_name" in metafunc.fixturenames:
        only = metafunc.config.getoption("--transport", default=None)
        metafunc.parametrize("transport_name", IN_ONE_PROCESS if only is None else [only])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --transport, the tests that are of no transport, or of another one by name, are left out."""
    if config.getoption("--transport", default=None) is not None:
        items[:] = [item for item in items if "transport_name" in getattr(item, "fixturenames", ())]


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    before = traces()
    yield
    if traces().added_to(before):
        request.node.funcargs.clear()  # A pool is mapped until its last view goes, and pytest holds what it gave us.
        gc.collect()
    assert not traces().added_to(before)
