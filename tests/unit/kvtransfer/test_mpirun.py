"""The command line that makes an MPI world, and what it does to the processes in it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvtransfer.transports import mpirun

NEEDS_MPIRUN = pytest.mark.skipif(mpirun.path() is None, reason=f"needs mpirun: {mpirun.TO_INSTALL}")


@NEEDS_MPIRUN
def test_each_program_is_one_process_of_one_world() -> None:
    line = mpirun.command(["a", "1"], ["b"])
    assert line[-8:] == ["-n", "1", "a", "1", ":", "-n", "1", "b"]
    assert line[0] == mpirun.path()


def test_without_mpirun_it_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert mpirun.path() is None
    with pytest.raises(FileNotFoundError, match=re.escape("pip install 'disaggregated[mpi]'")):
        mpirun.command(["a"])


@NEEDS_MPIRUN
def test_a_process_that_dies_ends_no_other(tmp_path: Path) -> None:
    """The second one hears of it by the end of a pipe, and speaks then."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    first = ["/bin/sh", "-c", f"exec 3>{pipe}; kill -9 $$"]
    second = ["/bin/sh", "-c", f"cat {pipe}; echo $PMIX_RANK lives"]
    ended = subprocess.run(mpirun.command(first, second), capture_output=True, text=True, timeout=200, check=False)
    assert ended.stdout == "1 lives\n"
