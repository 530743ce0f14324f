"""Which MPI world a process is in, asked before MPI is loaded; when it begins; and whom it takes for a member of it."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from disaggregated.errors import TransferError
from disaggregated.parent_death import PARENT_PID
from kvtransfer.deadline import Deadline
from kvtransfer.transports import mpi_world, mpirun
from kvtransfer.transports.mpi_thread import Communicator, Request
from kvtransfer.transports.mpi_world import ABANDONED_MAX, MpiAddress, MpiWorld
from kvtransfer.transports.transit import Doorbell, Transit
from tests.support.kv_endpoints import LeaseGate, make_endpoint, make_transport
from tests.support.kv_pools import SMALL, regions


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
    subprocess.run([sys.executable, "-c", script], check=True, timeout=200)


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


class SlowWorld(MpiWorld):
    """Its other processes come when `others_come` is set; MPI itself may fail."""

    def __init__(self, failure: str = "") -> None:
        super().__init__()
        self.others_come = threading.Event()
        self.num_begun = 0
        self._why_not = failure

    def _begin(self) -> Communicator:
        self.num_begun += 1
        assert self.others_come.wait(20)
        if self._why_not:
            raise RuntimeError(self._why_not)
        return Nobody()

    def _finalise(self) -> None:
        """There is nothing to leave."""

    def end(self) -> None:
        self.others_come.set()
        self.thread.end()
        assert self._runner is not None
        self._runner.join(20)
        assert not self._runner.is_alive()


class Nobody:
    def Isend(self, buf: object, dest: int, tag: int) -> Request:
        raise AssertionError("nothing is sent here")

    def Irecv(self, buf: object, source: int, tag: int) -> Request:
        raise AssertionError("nothing is received here")


def test_beginning_waits_for_nobody_and_joining_for_all_the_others() -> None:
    world = SlowWorld()
    world.begin()
    world.begin()
    world.check()
    with pytest.raises(TransferError, match=r"MPI has not begun after 0 s: .*backend: MPI"):
        world.join(deadline=Deadline.after(0.01))
    world.others_come.set()
    world.join(deadline=Deadline.after(20))
    world.end()
    assert world.num_begun == 1


def test_an_mpi_that_cannot_begin_fails_every_join_with_its_own_words() -> None:
    world = SlowWorld("no network that it knows")
    world.begin()
    world.others_come.set()
    for _ in range(2):
        with pytest.raises(TransferError, match="MPI could not be begun: no network that it knows"):
            world.join(deadline=Deadline.after(20))
    with pytest.raises(TransferError, match="could not be begun"):
        world.check()


def test_a_world_that_does_not_let_go_of_messages_takes_no_new_ones() -> None:
    world = SlowWorld()
    world.others_come.set()
    world.join(deadline=Deadline.after(20))
    bell = Doorbell()
    transits = [Transit(bell, library="MPI") for _ in range(ABANDONED_MAX)]
    world.thread.abandon(transits)
    with pytest.raises(TransferError, match=f"does not let go of {ABANDONED_MAX} messages"):
        world.check()
    transits[0].end()
    world.check()
    bell.close()
    world.end()


def test_an_endpoint_begins_mpi_when_it_is_made_and_starts_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    world = SlowWorld()
    monkeypatch.setattr(mpi_world, "our_world", lambda: world)
    with regions(SMALL) as (source, into):
        endpoint = make_endpoint("MPI", source, SMALL)
        make_transport("MPI", into, SMALL)
        assert world._runner is not None
        endpoint.start(LeaseGate([], num_layers=SMALL.num_layers))
        assert endpoint.describe().name == "MPI"
        assert not world._settled.is_set()
        endpoint.close(deadline=Deadline.after(20))
    world.end()


FIRST_OF_TWO = """
import os, sys, threading
from kvtransfer.deadline import Deadline
from kvtransfer.transports import mpi_world, mpirun
world = mpi_world.our_world()
if comes_late := os.environ["PMIX_RANK"] == "1":
    open(sys.argv[1]).read()
world.begin()
if not comes_late:
    while len(os.listdir("/proc/self/task")) < 3:  # The main thread's, MPI's, and the one that MPI_Init starts.
        pass
    threads = [threading.Thread(target=int) for _ in range(10)]
    for thread in threads:
        thread.start()
        thread.join()
    open(sys.argv[1], "w").close()
world.join(deadline=Deadline.after(30))
print(world.ours.rank, "of", world.size)
"""


@pytest.mark.skipif(
    mpirun.path() is None or "mpi4py" in str(mpi_world.missing()), reason=f"needs MPI: {mpirun.TO_INSTALL}"
)
def test_while_mpi_begins_every_other_thread_of_the_process_goes_on(tmp_path: Path) -> None:
    """The second one begins MPI only when the first one, which waits for it in MPI_Init, has run ten threads."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    program = [sys.executable, "-c", FIRST_OF_TWO, str(pipe)]
    environ = {**os.environ, **mpirun.LOOPBACK_ONLY}
    command = mpirun.command(program, program)
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200, check=False)
    assert sorted(ended.stdout.splitlines()) == ["0 of 2", "1 of 2"], ended.stderr
