"""What every contract test checks without saying so: nothing of a transfer is left in this process."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.support.kv_pools import traces


@pytest.fixture(params=["SHM", "TCP"])
def transport_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    before = traces()
    yield
    if traces() != before:
        request.node.funcargs.clear()  # A pool is mapped until its last view goes, and pytest holds what it gave us.
        gc.collect()
    assert traces() == before
