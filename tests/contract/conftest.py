"""Which transports the contract suite runs over, and what every test of it checks without saying so.

SHM and TCP need nothing and run in one process. No two network libraries share one, so each of the others has the same
suite in a process of its own, which `test_library_transports.py` starts, or you:

    pytest tests/contract --transport UCX
"""

from __future__ import annotations

import gc
import time
from collections.abc import AsyncIterator, Generator, Iterator

import pytest

from tests.support.kv_endpoints import SLACK_S
from tests.support.kv_pools import traces
from tests.support.kv_transfers import Both, connected

IN_ONE_PROCESS = ("SHM", "TCP")
HAS_FAILED = pytest.StashKey[bool]()


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[HAS_FAILED] = item.stash.get(HAS_FAILED, False) or report.failed
    return report


@pytest.fixture
async def both(transport_name: str) -> AsyncIterator[Both]:
    async with connected(transport_name) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    before = traces()
    yield
    if request.node.stash.get(HAS_FAILED, False):
        return  # What the traceback of its failure keeps alive would only be a second failure.
    if traces().added_to(before):
        request.node.funcargs.clear()  # A pool is mapped until its last view goes, and pytest holds what it gave us.
    end_s = time.monotonic() + SLACK_S
    while traces().added_to(before) and time.monotonic() < end_s:
        gc.collect()
        time.sleep(0.01)  # A thread that was told to end has no way to say that it has.
    assert not traces().added_to(before)
