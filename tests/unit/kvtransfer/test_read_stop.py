import socket
from collections.abc import Iterator

import pytest

from kvtransfer.transport import ReadStop, ReadStopped


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def is_shut(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False


def test_a_stop_shuts_the_socket_that_is_read_from(ends: tuple[socket.socket, socket.socket]) -> None:
    stop = ReadStop()
    seen = []

    def read() -> None:
        with stop.shuts(ends[0]):
            stop.request()
            seen.append(is_shut(ends[0]))

    with pytest.raises(ReadStopped):
        read()
    assert seen == [True]


def test_a_read_that_ended_well_just_when_it_was_stopped_does_not_pass_for_good(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """Its socket is shut; who kept it for the next read would find a broken pipe."""
    stop = ReadStop()
    with pytest.raises(ReadStopped), stop.shuts(ends[0]):
        stop.request()


def test_a_stop_after_the_read_leaves_its_socket_alone(ends: tuple[socket.socket, socket.socket]) -> None:
    stop = ReadStop()
    with stop.shuts(ends[0]):
        stop.check()
    stop.request()
    assert not is_shut(ends[0])
    with pytest.raises(ReadStopped):
        stop.check()


def test_what_was_stopped_shuts_no_further_socket(ends: tuple[socket.socket, socket.socket]) -> None:
    stop = ReadStop()
    stop.request()
    with pytest.raises(ReadStopped), stop.shuts(ends[0]):
        pytest.fail("a read began after its stop")
    assert not is_shut(ends[0])


def test_an_error_inside_is_not_hidden_by_the_stop(ends: tuple[socket.socket, socket.socket]) -> None:
    stop = ReadStop()

    def read() -> None:
        with stop.shuts(ends[0]):
            stop.request()
            raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        read()
