from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Final

import pytest

from disaggregated.errors import QuotaExceeded
from orchestrator.admission.api_keys import ApiKey, digest_of
from orchestrator.admission.quotas import Level, Quotas
from orchestrator.workers.shared_levels import SharedLevels, make_levels_memory

ADD: Final = """
import sys
from orchestrator.admission.quotas import Level
from orchestrator.workers.shared_levels import SharedLevels

levels = SharedLevels(int(sys.argv[1]))
for _ in range(2000):
    levels.update("tokens of k", lambda level: Level((level.amount if level else 0.0) + 1.0, 5.0))
"""

HOLD: Final = """
import fcntl, sys
fcntl.lockf(int(sys.argv[1]), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def fd() -> Iterator[int]:
    made = make_levels_memory()
    yield made
    os.close(made)


def test_a_level_is_there_for_whoever_asks_next_and_each_bucket_has_its_own(fd: int) -> None:
    one, other = SharedLevels(fd), SharedLevels(fd)
    assert one.update("a", lambda level: Level(3.0, 1.0) if level is None else level) == Level(3.0, 1.0)
    assert other.update("a", lambda level: level or Level(0.0, 0.0)) == Level(3.0, 1.0)
    assert other.update("b", lambda level: level or Level(9.0, 2.0)) == Level(9.0, 2.0)
    for levels in (one, other):
        levels.close()


def test_thousands_of_buckets_do_not_get_in_one_anothers_way(fd: int) -> None:
    levels = SharedLevels(fd)
    for number in range(10_000):
        levels.update(f"bucket {number}", lambda _, amount=float(number): Level(amount, 0.0))  # type: ignore[misc]
    for number in range(10_000):
        assert levels.update(f"bucket {number}", lambda level: level or Level(-1.0, 0.0)).amount == number
    levels.close()


def test_next_to_no_charge_is_lost_however_hard_processes_press(fd: int) -> None:
    workers = [subprocess.Popen([sys.executable, "-c", ADD, str(fd)], pass_fds=(fd,)) for _ in range(3)]
    assert [worker.wait(30) for worker in workers] == [0, 0, 0]
    levels = SharedLevels(fd)
    assert 5900.0 <= levels.update("tokens of k", lambda level: level or Level(0.0, 0.0)).amount <= 6000.0
    levels.close()


def test_a_worker_that_stands_still_with_the_lock_stops_nobody(fd: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(fd)], pass_fds=(fd,), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError):
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        levels = SharedLevels(fd)
        assert levels.update("a", lambda _: Level(1.0, 0.0)).amount == 1.0
        levels.close()
        process.kill()


def test_a_keys_minute_is_used_up_by_all_workers_together(fd: int) -> None:
    key = ApiKey(name="k", digest=digest_of("x" * 20), requests_per_minute=4)
    memories = [SharedLevels(fd), SharedLevels(fd)]
    quotas = [Quotas(memory, clock=lambda: 10.0) for memory in memories]
    for number in range(4):
        quotas[number % 2].take(key, "requests", 1)
    for each in quotas:
        with pytest.raises(QuotaExceeded):
            each.take(key, "requests", 1)
    for memory in memories:
        memory.close()
