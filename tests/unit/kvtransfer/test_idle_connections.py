"""A link's connections between two reads: what became of one while it was idle costs no read."""

from __future__ import annotations

import socket

import pytest

from kvtransfer.deadline import Deadline
from kvtransfer.transport import BlockRead, ReadStop
from kvtransfer.transports import frames
from kvtransfer.transports.frame_socket import FrameSocket
from kvtransfer.transports.link import FramedLink

GO_AHEAD = frames.pack_blocks_header(0)


class Peers:
    """Dials into nothing: the test holds the other end of each connection, and writes answers before they are asked."""

    def __init__(self) -> None:
        self.ends: list[socket.socket] = []
        self.num_landed = 0

    def dial(self, *, deadline: Deadline) -> FrameSocket:
        ours, theirs = socket.socketpair()
        self.ends.append(theirs)
        return FrameSocket(ours)

    def num_bytes_sent(self, read: BlockRead) -> int:
        return 0

    def land(self, connection: FrameSocket, read: BlockRead, *, stop: ReadStop) -> None:
        self.num_landed += 1

    def close(self) -> None:
        for end in self.ends:
            end.close()


@pytest.fixture
def peers() -> Peers:
    return Peers()


def read(link: FramedLink, peers: Peers, *, answers: int = 1) -> None:
    """The source's answer is there before the question, as many times as `answers` says."""
    dial = peers.dial

    def dial_and_answer(*, deadline: Deadline) -> FrameSocket:
        connection = dial(deadline=deadline)
        peers.ends[-1].sendall(GO_AHEAD * answers)
        return connection

    peers.dial = dial_and_answer  # type: ignore[method-assign]
    order = BlockRead(lease_key=bytes(16), epoch=1, source=(0,), into=(0,), layers=range(1))
    link.read(order, stop=ReadStop(), deadline=Deadline.after(20))
    peers.dial = dial  # type: ignore[method-assign]


def a_link(peers: Peers) -> FramedLink:
    return FramedLink(peers, transport="TEST", block_bytes=512)


def test_an_answer_that_nobody_waits_for_ends_its_connection_and_not_the_next_read(peers: Peers) -> None:
    link = a_link(peers)
    read(link, peers, answers=2)
    read(link, peers)
    assert (peers.num_landed, len(peers.ends)) == (2, 2)
    assert peers.ends[0].recv(1) == b"K"  # Our first question; the connection is closed behind it.
    link.close(deadline=Deadline.after(20))


def test_a_connection_that_the_peer_closed_while_idle_is_replaced(peers: Peers) -> None:
    link = a_link(peers)
    read(link, peers)
    peers.ends[0].close()
    read(link, peers)
    assert (peers.num_landed, len(peers.ends)) == (2, 2)
    link.close(deadline=Deadline.after(20))


def test_a_connection_in_order_is_used_again(peers: Peers) -> None:
    link = a_link(peers)
    link.open(deadline=Deadline.after(20))
    assert len(peers.ends) == 1
    taken = link._take_idle()
    assert taken is not None
    assert link._take_idle() is None
    taken.close()
    link.close(deadline=Deadline.after(20))
