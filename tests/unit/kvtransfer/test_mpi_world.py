"""Which MPI world a process is in, asked before MPI is loaded; and whom it takes for a member of the same one."""

import subprocess
import sys

import pytest

from disaggregated.errors import TransferError
from disaggregated.parent_death import PARENT_PID
from kvtransfer.transports import mpi_world
from kvtransfer.transports.mpi_world import MpiAddress, MpiWorld


@pytest.mark.parametrize("name", ["PMIX_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"])
def test_a_process_that_a_launcher_has_started_misses_nothing(name: str) -> None:
    pytest.importorskip("mpi4py")
    assert mpi_world.missing({name: "0"}) is None


def test_a_process_that_was_started_alone_is_told_how_to_launch() -> None:
    pytest.importorskip("mpi4py")
    assert "mpirun -n 1 disaggregated serve context" in str(mpi_world.missing({}))


def test_a_server_that_a_launched_orchestrator_has_started_is_no_rank_of_its_own() -> None:
    pytest.importorskip("mpi4py")
    assert "in one MPI world" in str(mpi_world.missing({"PMIX_RANK": "0", PARENT_PID: "1"}))


def test_without_mpi4py_it_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "pip install 'disaggregated[mpi]'" in str(mpi_world.missing({"PMIX_RANK": "0"}))


def test_asking_loads_no_library() -> None:
    script = "import sys; from kvtransfer.transports import mpi; mpi.missing(); assert 'mpi4py' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_an_address_comes_back_as_it_was_packed() -> None:
    address = MpiAddress(b"w" * 16, 70_000)
    assert MpiAddress.unpack(address.pack()) == address


@pytest.mark.parametrize("packed", [b"", b"x", b"x" * 19, b"x" * 21])
def test_what_is_no_address_is_refused(packed: bytes) -> None:
    with pytest.raises(TransferError, match="MPI address"):
        MpiAddress.unpack(packed)


def a_world(size: int = 4) -> MpiWorld:
    world = MpiWorld()
    world.size = size
    world.ours = MpiAddress(b"w" * 16, 1)
    return world


def test_a_rank_of_our_world_is_known() -> None:
    assert a_world().rank_of(MpiAddress(b"w" * 16, 3).pack()) == 3


@pytest.mark.parametrize("address", [MpiAddress(b"v" * 16, 3), MpiAddress(b"w" * 16, 4)])
def test_a_rank_of_another_world_or_beyond_ours_is_refused_in_words(address: MpiAddress) -> None:
    with pytest.raises(TransferError, match="another MPI world"):
        a_world().rank_of(address.pack())


def test_no_two_connections_have_one_tag_until_all_tags_were_used() -> None:
    world = a_world()
    tags = [world.fresh_tag() for _ in range(32767)]
    assert len(set(tags)) == 32767
    assert world.fresh_tag() == tags[0]


@pytest.mark.parametrize("tag", [-1, 32768, 2**40])
def test_a_tag_that_mpi_does_not_have_is_refused(tag: int) -> None:
    with pytest.raises(TransferError, match="tag"):
        a_world().check_tag(tag)


def test_processes_of_one_launch_have_one_key_and_others_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMIX_NAMESPACE", "prterun-host-1@1")
    ours = mpi_world._world_key(2)
    assert ours == mpi_world._world_key(2)
    assert ours != mpi_world._world_key(3)
    monkeypatch.setenv("PMIX_NAMESPACE", "prterun-host-2@1")
    assert ours != mpi_world._world_key(2)
