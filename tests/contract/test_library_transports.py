"""The contract suite over transports that bring a library: each in a process of its own, since no two share one."""

import subprocess
import sys
from pathlib import Path

import pytest

from kvtransfer import registry

HERE = Path(__file__).parent
SUITE = (
    "test_transports.py",
    "test_hostile_peers.py",
    "test_transfers.py",
    "test_transfer_faults.py",
    "test_dying_ends.py",
    "test_altered_greetings.py",
)


@pytest.fixture(autouse=True)
def not_within_itself(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--transport", default=None) is not None:
        pytest.skip("this is the process that it starts")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["UCX", "NIXL"])
def test_a_library_passes_the_contract_suite(name: str) -> None:
    if reason := registry.missing(name):
        pytest.skip(f"{name} {reason}")
    files = [str(HERE / each) for each in SUITE]
    suite = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "--transport", name, "-m", "not soak", "--timeout", "60"],
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=230,
        check=False,
    )
    assert suite.returncode == 0, suite.stdout[-8000:] + suite.stderr[-2000:]
    assert " passed" in suite.stdout


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
    subprocess.run([sys.executable, "-c", script], check=True, cwd=HERE.parents[1], timeout=60)
