"""A server that an orchestrator started dies with it, however the orchestrator dies."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from typing import Final

PARENT_PID: Final = "DISAGG_PARENT_PID"
"""Environment variable that names the process to die with; unset for a server that an operator started."""

_PR_SET_PDEATHSIG: Final = 1


def die_with_parent(environ: Mapping[str, str] = os.environ) -> None:
    """Called first thing in a server: the kernel keeps the promise from then on, and what happened before is looked up.

    It is a SIGKILL, since nobody is left to wait for anything gentler. Only Linux has this; elsewhere it does nothing.
    """
    parent = environ.get(PARENT_PID)
    if not parent or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit(1)
