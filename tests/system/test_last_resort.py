"""A process that cannot end by itself, because something below it does not return."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

STUCK = """
import threading
from concurrent.futures import ThreadPoolExecutor
from disaggregated.engine.serving.last_resort import gone_within

ThreadPoolExecutor(1, thread_name_prefix="kv-pull").submit(threading.Event().wait)
gone_within(0.5, 70)
"""
WELL = """
from disaggregated.engine.serving.last_resort import gone_within

gone_within(250, 70)
"""


def ended(script: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", script]
    return subprocess.run(command, check=False, cwd=root, capture_output=True, text=True, timeout=200)


def test_a_thread_that_never_returns_does_not_keep_its_process() -> None:
    child = ended(STUCK)
    assert child.returncode == 70
    assert "ended_by_force" in child.stderr
    assert "in wait" in child.stderr, "it is not said where it hangs"


def test_a_process_that_ends_by_itself_is_not_kept_until_then() -> None:
    begin_s = time.monotonic()
    assert ended(WELL).returncode == 0
    assert time.monotonic() - begin_s < 200
