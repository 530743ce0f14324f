"""One port for several processes: taken once, shared by those who ask for it, and nobody else's."""

from __future__ import annotations

import contextlib
import select
import socket

import pytest

from disaggregated.errors import PortTaken
from orchestrator.listening import listen
from orchestrator.workers.worker import reserve


def test_a_reserved_port_takes_no_connections_itself() -> None:
    with contextlib.closing(reserve("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
        assert port > 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=20).close()


def test_connections_are_dealt_out_among_those_who_listen() -> None:
    with contextlib.ExitStack() as stack:
        reserved = stack.enter_context(contextlib.closing(reserve("127.0.0.1", 0)))
        port = reserved.getsockname()[1]
        workers = [stack.enter_context(contextlib.closing(listen("127.0.0.1", port, shared=True))) for _ in range(2)]
        for _ in range(64):
            stack.enter_context(contextlib.closing(socket.create_connection(("127.0.0.1", port), timeout=20)))
        taken = dict.fromkeys(workers, 0)
        while sum(taken.values()) < 64:
            ready, _, _ = select.select(workers, [], [], 20)
            assert ready, f"{taken} of 64"
            for worker in ready:
                stack.enter_context(contextlib.closing(worker.accept()[0]))
                taken[worker] += 1
        assert min(taken.values()) >= 10


def test_once_a_worker_listens_no_other_deployment_can() -> None:
    with contextlib.ExitStack() as stack:
        theirs = stack.enter_context(contextlib.closing(reserve("127.0.0.1", 0)))
        port = theirs.getsockname()[1]
        stack.enter_context(contextlib.closing(listen("127.0.0.1", port, shared=True)))
        for take in (listen, reserve):
            with pytest.raises(PortTaken, match="choose another one"):
                take("127.0.0.1", port)


def test_a_connection_is_kept_alive_from_the_moment_it_is_accepted() -> None:
    with contextlib.closing(listen("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        listener.setblocking(True)
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
