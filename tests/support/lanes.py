"""How `make test` deals the tests out to its two workers.

A worker takes one lane after another, in the order in which pytest collects them. A lane is a file, whose module
fixtures are then made once. All of tests/system is one lane: its servers mostly wait, for each other and for time-outs,
so that another worker can compute meanwhile; but two deployments at once would take each other's cores. A test that is
a whole suite in a process of its own is a lane, too.
"""

from __future__ import annotations

from typing import Final

import pytest
from xdist.scheduler import LoadScopeScheduling

ONE_LANE: Final = ("tests/system/",)
LANE_A_TEST: Final = ("tests/contract/test_library_transports.py",)


def lane_of(nodeid: str) -> str:
    file = nodeid.partition("::")[0]
    if file in LANE_A_TEST:
        return nodeid
    return next((folder for folder in ONE_LANE if file.startswith(folder)), file)


def make_scheduler(config: pytest.Config, log: object) -> object:
    """What xdist makes for `--dist loadfile`, with other lanes."""
    scheduling = LoadScopeScheduling(config, log)
    scheduling._split_scope = lane_of
    return scheduling
