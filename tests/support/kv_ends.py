"""The two ends of a transport as processes of their own, without gRPC: to kill and to freeze in the middle of a read.

python -m tests.support.kv_ends source NAME          prints its offer, serves until its input ends
python -m tests.support.kv_ends destination NAME     takes an offer, then reads the whole pool again and again, and
                                                     prints a line when it begins and after each time
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from disaggregated.security.membership import join_as_told
from disaggregated.security.tls import TlsFiles
from kvtransfer.deadline import Deadline
from kvtransfer.runs import Run
from kvtransfer.transport import BlockRead, Offer, PeerLink, ReadStop, SourceIdentity
from tests.support.kv_endpoints import PATIENT_S, make_endpoint, make_transport
from tests.support.kv_pools import EPOCH, LARGE, regions

KEY: Final = b"everybody's key."
IDENTITY: Final = SourceIdentity(instance_id="context-0", epoch=EPOCH, layout=LARGE)


class OpenGate:
    """Every block is published, to everybody."""

    def check_read(
        self, *, lease_key: bytes, epoch: int, blocks: Sequence[Run], layers: range, peer_id: str
    ) -> None: ...


def order(blocks: Sequence[int]) -> BlockRead:
    """Into the same places."""
    return BlockRead(lease_key=KEY, epoch=EPOCH, source=blocks, into=blocks, layers=range(LARGE.num_layers))


def scattered() -> list[int]:
    """Every block, none beside its neighbour."""
    return [block * 89 % LARGE.num_blocks for block in range(LARGE.num_blocks)]


def read(link: PeerLink, blocks: Sequence[int], *, timeout_s: float = 30.0) -> None:
    link.read(order(blocks), stop=ReadStop(), deadline=Deadline.after(timeout_s))


@dataclasses.dataclass(frozen=True)
class End:
    """One of them. `said` blocks until its next line; the test's own timeout is the deadline."""

    child: subprocess.Popen[str]

    def said(self) -> Any:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        assert line, f"the process ended with {self.child.wait()}"
        return json.loads(line)

    def told(self, value: Any) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(value) + "\n")
        self.child.stdin.flush()

    def kill(self) -> None:
        self.child.kill()
        self.child.wait()

    def freeze(self) -> None:
        """Returns once the process stands still."""
        self.child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.child.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        self.child.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def end(role: str, name: str, environ: Mapping[str, str] | None = None) -> Iterator[End]:
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.support.kv_ends", role, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **(environ or {})},
    )
    try:
        yield End(child)
    finally:
        child.kill()
        child.communicate()


@contextlib.contextmanager
def serving(name: str, environ: Mapping[str, str] | None = None) -> Iterator[tuple[End, Offer]]:
    """A source, and how to reach it."""
    with end("source", name, environ) as source:
        yield source, Offer(**source.said())


def say(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def serve(name: str) -> None:
    with regions(LARGE, 1) as (region,):
        endpoint = make_endpoint(name, region, LARGE)
        endpoint.start(OpenGate())
        say(dataclasses.asdict(endpoint.describe()))
        sys.stdin.read()
        endpoint.close(deadline=Deadline.after(20))


def read_again_and_again(name: str) -> None:
    offer = Offer(**json.loads(sys.stdin.readline()))
    with regions(LARGE) as (_, region):
        transport = make_transport(name, region, LARGE, progress_timeout_s=PATIENT_S)
        link = transport.connect(offer, IDENTITY, deadline=Deadline.after(10))
        say("begins")
        while True:
            read(link, scattered())
            say("read")


if __name__ == "__main__":
    join_as_told(secret_file="", tls=TlsFiles())
    {"source": serve, "destination": read_again_and_again}[sys.argv[1]](sys.argv[2])
