"""A process that was told to end ends, whatever it still waits for.

A read that is stuck in a library keeps its thread, its thread keeps the interpreter, and its blocks must not be given
back: nothing inside can end that. So whoever ends a process says by when it is gone.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading

from disaggregated import logs

log = logs.get(__name__)


def gone_within(seconds: float, exit_code: int) -> None:
    """Unless the process has ended by then, say where each of its threads is, and end it. Called once, at its end."""
    last = threading.Timer(seconds, _end, args=(seconds, exit_code))
    last.daemon = True
    last.start()


def _end(seconds: float, exit_code: int) -> None:
    log.error("ended_by_force", waited_s=seconds, threads=[thread.name for thread in threading.enumerate()])
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    sys.stderr.flush()
    os._exit(exit_code)
