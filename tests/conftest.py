"""Every test runs as a member of one cluster, and so does every process that a test starts. No example is timed."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from typing import Final

import pytest
from hypothesis import settings

from disaggregated.security.membership import Membership, join
from disaggregated.security.secret import VARIABLE, ClusterSecret

SECRET: Final = "the secret of all processes that tests start"

os.environ.setdefault("OMP_NUM_THREADS", "1")
"""A test computes little, and another worker runs beside it: threads that spin while they wait would cost more."""
os.environ[VARIABLE] = SECRET
join(Membership(secret=ClusterSecret(SECRET)))

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Thousands of modules are loaded here, and none becomes garbage. Many a test collects garbage to see that nothing
    is left behind: it need not look at all of them each time."""
    gc.disable()
    result = yield
    gc.collect()
    gc.freeze()
    gc.enable()
    return result


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Of `make test`; a plain `pytest` runs in one process and needs no xdist."""
    from tests.support.lanes import make_scheduler

    return make_scheduler(config, log)
