"""The contract suite over transports that bring a library: each in a process of its own, since no two share one."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from kvtransfer import registry
from kvtransfer.transports import mpirun

HERE = Path(__file__).parent
SUITE = (
    "test_transports.py",
    "test_hostile_peers.py",
    "test_transfers.py",
    "test_transfer_endings.py",
    "test_transfer_faults.py",
    "test_dying_ends.py",
    "test_altered_greetings.py",
)

TIMEOUT_S = 600
"""Of a suite: each takes 10 to 20 s on idle cores."""
OPTIONS = ("-m", "not soak", "--timeout", "120", "--color", "no")

pytestmark = pytest.mark.timeout(TIMEOUT_S + 10)


@pytest.fixture(autouse=True)
def not_within_itself(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--transport", default=None) is not None:
        pytest.skip("this is the process that it starts")


IN_ONE_PROCESS = ("test_transports.py", "test_hostile_peers.py", "test_transfers.py", "test_transfer_endings.py")
"""A child of a test is in no MPI world; tests/system/test_servers_mpi.py has its dying ends."""


def test_mpi_passes_the_contract_suite() -> None:
    if mpirun.path() is None or importlib.util.find_spec("mpi4py") is None:
        pytest.skip(f"MPI needs mpi4py and mpirun: {mpirun.TO_INSTALL}")
    passes("MPI", IN_ONE_PROCESS, mpirun.command([sys.executable]), environ=mpirun.LOOPBACK_ONLY)


def test_gloo_passes_the_contract_suite() -> None:
    passes("NCCL", IN_ONE_PROCESS, (sys.executable,), environ={"OMP_NUM_THREADS": "1"})


@pytest.mark.soak
def test_gloo_passes_it_between_processes_that_die() -> None:
    passes("NCCL", ("test_transfer_faults.py", "test_dying_ends.py"), (sys.executable,), environ={})


def passes(name: str, files: Sequence[str], python: Sequence[str], *, environ: Mapping[str, str]) -> None:
    suite = subprocess.run(
        [*python, "-m", "pytest", *(str(HERE / each) for each in files), "--transport", name, *OPTIONS],
        cwd=HERE.parents[1],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert suite.returncode == 0, suite.stdout[-8000:] + suite.stderr[-2000:]
    assert " passed" in suite.stdout


@pytest.mark.parametrize("name", ["UCX", "NIXL"])
def test_a_library_passes_the_contract_suite(name: str) -> None:
    if reason := registry.missing(name):
        pytest.skip(f"{name} {reason}")
    passes(name, SUITE, (sys.executable,), environ={})


def test_two_libraries_are_not_offered_from_one_process() -> None:
    """Asked in a process that has loaded one of them, the other says why it cannot be used there."""
    script = """
import sys
from kvtransfer import registry
for loaded, name in (("nixl_cu12", "UCX"), ("ucxx", "NIXL")):
    sys.modules[loaded] = sys
    assert "cannot be in one process" in registry.missing(name), name
    del sys.modules[loaded]
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=HERE.parents[1], timeout=200)
