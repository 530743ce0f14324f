"""The MPI thread over an MPI in memory: what it begins, what it asks for, and what it never lets go of too early."""

import dataclasses
import threading
import time
from collections.abc import Iterator

import pytest

from disaggregated.errors import PeerLost
from kvtransfer.deadline import Deadline
from kvtransfer.transports import mpi_thread
from kvtransfer.transports.mpi_thread import Message, MpiThread
from kvtransfer.transports.transit import Doorbell, Transit


@dataclasses.dataclass
class MemoryRequest:
    """Done once `buffer` was matched; a receive that was matched is not cancelled any more, as MPI has it."""

    buffer: memoryview
    is_done: bool = False
    is_cancelled: bool = False
    error: str = ""

    def Test(self) -> bool:
        if self.error:
            raise RuntimeError(self.error)
        return self.is_done

    def Cancel(self) -> None:
        self.is_cancelled = self.is_done = True


class MemoryWorld:
    """Sends complete when their receive is there, in order, as between two ranks of one tag."""

    def __init__(self) -> None:
        self.sends: list[MemoryRequest] = []
        self.receives: list[MemoryRequest] = []
        self.dead: set[int] = set()
        self.threads: set[int] = set()

    def Isend(self, buf: memoryview, dest: int, tag: int) -> MemoryRequest:
        return self._begin(self.sends, buf, dest)

    def Irecv(self, buf: memoryview, source: int, tag: int) -> MemoryRequest:
        return self._begin(self.receives, buf, source)

    def _begin(self, queue: list[MemoryRequest], buf: memoryview, peer: int) -> MemoryRequest:
        self.threads.add(threading.get_ident())
        if peer in self.dead:
            raise RuntimeError("MPI_ERR_PROC_FAILED: Process Failure")
        request = MemoryRequest(buf)
        queue.append(request)
        while self.sends and self.receives:
            send, receive = self.sends.pop(0), self.receives.pop(0)
            receive.buffer[:] = send.buffer
            send.is_done = receive.is_done = True
        return request


@dataclasses.dataclass
class Running:
    thread: MpiThread
    world: MemoryWorld
    bell: Doorbell

    def post(self, buffer: bytearray, *, is_send: bool, peer: int = 1) -> Transit:
        transit = Transit(self.bell, library="MPI")
        self.thread.post(Message(buffer=memoryview(buffer), is_send=is_send, peer=peer, tag=5, transit=transit))
        return transit


@pytest.fixture
def running() -> Iterator[Running]:
    thread, world, bell = MpiThread(), MemoryWorld(), Doorbell()
    runner = threading.Thread(target=thread.run, args=[world])
    runner.start()
    yield Running(thread, world, bell)
    thread.end()
    runner.join(20)
    assert not runner.is_alive()
    bell.close()


def soon() -> Deadline:
    return Deadline.after(20)


def test_messages_arrive_in_the_order_in_which_they_were_posted(running: Running) -> None:
    arrived = [bytearray(4) for _ in range(20)]
    receives = [running.post(buffer, is_send=False) for buffer in arrived]
    sends = [running.post(bytearray([number] * 4), is_send=True) for number in range(20)]
    for transit in (*receives, *sends):
        transit.wait_alone(soon())
    assert [buffer[0] for buffer in arrived] == list(range(20))


def test_every_call_of_mpi_is_made_by_one_thread(running: Running) -> None:
    others = [threading.Thread(target=running.post, args=[bytearray(1)], kwargs={"is_send": True}) for _ in range(8)]
    for other in others:
        other.start()
    for other in others:
        other.join(20)
    running.post(bytearray(1), is_send=False).wait_alone(soon())
    assert len(running.world.threads) == 1
    assert threading.get_ident() not in running.world.threads


def test_a_message_to_a_dead_process_fails_in_words(running: Running) -> None:
    running.world.dead.add(3)
    transit = running.post(bytearray(1), is_send=True, peer=3)
    with pytest.raises(PeerLost, match="MPI: MPI_ERR_PROC_FAILED"):
        transit.wait_alone(soon())


def test_a_process_that_dies_while_a_message_is_under_way_fails_it(running: Running) -> None:
    transit = running.post(bytearray(1), is_send=False)
    running.post(bytearray(1), is_send=True, peer=1).wait_alone(soon())
    transit.wait_alone(soon())
    late = running.post(bytearray(1), is_send=False)
    first = running.post(bytearray(1), is_send=False, peer=9)
    with pytest.raises(PeerLost, match="in time"):
        first.wait_alone(Deadline.after(0.01))
    while len(running.world.receives) < 2:
        time.sleep(0.001)  # Until the thread has posted them.
    running.world.receives[0].error = "MPI_ERR_PROC_FAILED"
    with pytest.raises(PeerLost, match="PROC_FAILED"):
        late.wait_alone(soon())


def test_an_abandoned_receive_stays_for_its_sender_and_is_counted(running: Running) -> None:
    buffer = bytearray(1)
    transit = running.post(buffer, is_send=False)
    running.thread.abandon([transit])
    assert running.thread.num_abandoned == 1
    running.post(bytearray(b"x"), is_send=True).wait_alone(soon())
    transit.wait_alone(soon())
    assert (bytes(buffer), running.thread.num_abandoned) == (b"x", 0)


def test_an_abandoned_receive_that_nobody_sends_to_is_cancelled_in_time(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpi_thread, "ABANDONED_S", 0.0)
    transit = running.post(bytearray(1), is_send=False)
    running.thread.abandon([transit])
    with pytest.raises(PeerLost, match="cancelled"):
        transit.wait_alone(soon())
    assert running.thread.num_abandoned == 0


def test_an_abandoned_send_is_never_cancelled(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi_thread, "ABANDONED_S", 0.0)
    transit = running.post(bytearray(b"x"), is_send=True)
    running.thread.abandon([transit])
    running.post(bytearray(1), is_send=True, peer=2)  # A round of the thread lies between.
    assert not transit.is_done
    assert running.thread.num_abandoned == 1
    for _ in range(2):
        running.post(bytearray(1), is_send=False).wait_alone(soon())
    transit.wait_alone(soon())


def test_what_is_done_already_is_not_abandoned(running: Running) -> None:
    sent, received = running.post(bytearray(1), is_send=True), running.post(bytearray(1), is_send=False)
    sent.wait_alone(soon())
    received.wait_alone(soon())
    running.thread.abandon([sent, received])
    assert running.thread.num_abandoned == 0


@pytest.mark.parametrize(("num_idle", "pause_s"), [(0, 0.0), (49, 0.0), (50, 20e-6), (51, 40e-6), (10_000, 1e-3)])
def test_the_thread_asks_at_once_first_and_then_ever_more_rarely(num_idle: int, pause_s: float) -> None:
    assert mpi_thread._pause_s(num_idle) == pytest.approx(pause_s)


def test_a_closed_bell_rings_into_no_other_descriptor() -> None:
    bell = Doorbell()
    bell.ring()
    assert bell.wait(Deadline.after(1))
    bell.close()
    bell.close()
    bell.ring()
    assert bell.fileno() == -1
