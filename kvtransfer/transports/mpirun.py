"""How processes are put into one MPI world: the command line that starts them, in one place."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

FLAGS: Final = ("--with-ft", "ulfm", "--runtime-options", "error-nonzero-status=0,continuous")
"""With which Open MPI 5 lets the others live when one process dies, and tells them; without, it ends all of them."""
ON_ONE_MACHINE: Final = ("--allow-run-as-root", "--oversubscribe", "--bind-to", "none")
"""For worlds that we start ourselves, to try MPI: whoever we are, however few cores there are."""
LOOPBACK_ONLY: Final[Mapping[str, str]] = {"OMPI_MCA_btl": "self,sm,tcp", "OMPI_MCA_btl_tcp_if_include": "lo"}
"""Environment of the same: Open MPI listens on every interface otherwise, and asks nobody who he is."""
TO_INSTALL: Final = "pip install 'disaggregated[mpi]'"


def path() -> str | None:
    """Of the mpirun beside our Python, which is the one that comes with its MPI; else of the first in the PATH."""
    beside = str(Path(sys.executable).parent)
    return shutil.which("mpirun", path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]))


def command(*programs: Sequence[str]) -> list[str]:
    """Starts one process of each of `programs`, all of one world, on this machine.

    SIGTERM ends it and all of them; a SIGKILL leaves them behind. Raises FileNotFoundError where there is no mpirun.
    """
    mpirun = path()
    if mpirun is None:
        raise FileNotFoundError(f"there is no mpirun beside {sys.executable} or in the PATH: {TO_INSTALL}")
    line = [mpirun, *ON_ONE_MACHINE, *FLAGS]
    for program in programs:
        line += ["-n", "1", *program, ":"]
    return line[:-1]
