"""Moves blocks between two real processes of this machine over one transport: does it work here, and how fast?

    measure("TCP")                                        spawns both, returns what was found
    python -m kvtransfer.probe serve TCP FOLDER           the source: writes its offer into FOLDER/offer
    python -m kvtransfer.probe read TCP FOLDER            the destination: prints one JSON line

Each end is a process of its own, since no two network libraries share one. They find each other by two pipes in FOLDER.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from disaggregated.errors import TransferError
from disaggregated.kv_layout import KVLayout
from kvtransfer import registry
from kvtransfer.deadline import Deadline
from kvtransfer.region import Region
from kvtransfer.runs import Run
from kvtransfer.transport import BlockRead, Offer, OurEnd, PeerLink, ReadStop, SourceIdentity
from kvtransfer.transports import mpirun

LAYOUT: Final = KVLayout(num_layers=4, num_kv_heads=4, head_dim=64, block_size=32, dtype="float32", num_blocks=256)
"""64 MiB in blocks of 64 KiB."""
EPOCH: Final = 1
LEASE_KEY: Final = bytes(16)
TIMEOUT_S: Final = 30.0
NUM_RUNS: Final = 5
NUM_LATENCIES: Final = 50
LIFETIME_S: Final = 120
"""Of one end, should whoever started it be gone."""
STOP_TIMEOUT_S: Final = 5.0
"""For an end, or mpirun, to go when it is told to."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What one transport did between two processes here. `failure` is "" when every byte arrived as it was."""

    transport: str
    gb_per_s: float = 0.0
    """Median of whole reads of 64 MiB in scattered blocks, without verification."""
    latency_us: float = 0.0
    """Median for one block of 64 KiB."""
    failure: str = ""


def measure(name: str, *, timeout_s: float = TIMEOUT_S) -> Probe:
    """Takes a second or two. Never raises for what is wrong with the transport; that is the result."""
    with tempfile.TemporaryDirectory(prefix="disaggregated-probe-") as folder:
        for pipe in ("offer", "done"):
            os.mkfifo(Path(folder, pipe))
        commands = [[sys.executable, "-m", "kvtransfer.probe", end, name, folder] for end in ("serve", "read")]
        try:
            return Probe(**json.loads(_run(name, commands, timeout_s)))
        except subprocess.TimeoutExpired:
            return Probe(transport=name, failure=f"nothing within {timeout_s:g} s")
        except (OSError, ValueError, TypeError) as error:
            return Probe(transport=name, failure=f"the probe ended without a result: {error}")


def _run(name: str, commands: Sequence[Sequence[str]], timeout_s: float) -> str:
    """The last line that the reading end printed. Both ends have ended when this returns or raises."""
    environ = dict(os.environ)
    if name == "MPI":
        commands = [mpirun.command(*commands)]
        environ |= mpirun.LOOPBACK_ONLY
    children: list[subprocess.Popen[str]] = []
    try:
        for command in commands:
            children.append(
                subprocess.Popen(
                    command,
                    env=environ,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        said, complaints = children[-1].communicate(timeout=timeout_s)
        lines = said.strip().splitlines()
        if not lines:
            raise OSError(complaints.strip().splitlines()[-1] if complaints.strip() else "it said nothing")
        return lines[-1]
    finally:
        for child in children:
            _end(child)


def _end(child: subprocess.Popen[str]) -> None:
    """SIGTERM first: an mpirun that is killed leaves behind what it has started."""
    child.terminate()
    try:
        child.communicate(timeout=STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()


def main() -> None:
    end, name, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    signal.alarm(LIFETIME_S)
    try:
        if end == "serve":
            _serve(name, folder)
        else:
            _say(_read(name, folder))
    except Exception as error:  # noqa: BLE001 - the edge of this process: whatever it is, the other end waits for it.
        failure = f"{type(error).__name__}: {error}"
        if end == "serve":
            Path(folder, "offer").write_text(json.dumps({"failure": failure}))
        else:
            _say(Probe(transport=name, failure=failure))


def _say(found: Probe) -> None:
    sys.stdout.write(json.dumps(dataclasses.asdict(found)) + "\n")


class _EverybodyMayRead:
    """Stands for a lease book: every block is published, under one key."""

    def check_read(
        self, *, lease_key: bytes, epoch: int, blocks: Sequence[Run], layers: range | None = None, peer_id: str = ""
    ) -> None:
        if (lease_key, epoch) != (LEASE_KEY, EPOCH):
            raise TransferError("the probe has one lease, and this is not its key")


def _serve(name: str, folder: Path) -> None:
    with Region.allocate(LAYOUT.pool_bytes, populate=True) as region:
        _noise(region)
        endpoint = registry.load(name).make_endpoint(region, LAYOUT, epoch=EPOCH, host="127.0.0.1")
        endpoint.start(_EverybodyMayRead())
        Path(folder, "offer").write_text(json.dumps(dataclasses.asdict(endpoint.describe())))
        Path(folder, "done").read_text()  # Returns when the other end has opened and closed it.
        endpoint.close(deadline=Deadline.after(5.0))


def _read(name: str, folder: Path) -> Probe:
    with Region.allocate(LAYOUT.pool_bytes, populate=True) as region:
        # Made before the offer is waited for: the processes of an MPI world can only begin together.
        transport = registry.load(name).make_transport(OurEnd(region=region, layout=LAYOUT, peer_id="probe"))
        told = json.loads(Path(folder, "offer").read_text())
        if failure := told.get("failure"):
            return Probe(transport=name, failure=f"the source: {failure}")
        source = SourceIdentity(instance_id="probe-source", epoch=EPOCH, layout=LAYOUT)
        link = transport.connect(Offer(**told), source, deadline=Deadline.after(5.0))
        try:
            found = _measured(name, link, region)
        finally:
            link.close(deadline=Deadline.after(5.0))
    Path(folder, "done").write_text("done")
    return found


def _measured(name: str, link: PeerLink, region: Region) -> Probe:
    every = list(range(LAYOUT.num_blocks))
    scattered = [block * 89 % LAYOUT.num_blocks for block in every]
    whole = [_seconds(link, scattered, range(LAYOUT.num_layers)) for _ in range(NUM_RUNS)]
    one = [_seconds(link, [block], range(1)) for block in scattered[:NUM_LATENCIES]]
    with Region.allocate(LAYOUT.pool_bytes) as expected:
        _noise(expected)
        if region.buffer != expected.buffer:
            return Probe(transport=name, failure="bytes arrived that are not those that were sent")
    return Probe(
        transport=name,
        gb_per_s=LAYOUT.pool_bytes / statistics.median(whole) / 1e9,
        latency_us=statistics.median(one) * 1e6,
    )


def _seconds(link: PeerLink, blocks: Sequence[int], layers: range) -> float:
    order = BlockRead(lease_key=LEASE_KEY, epoch=EPOCH, source=blocks, into=blocks, layers=layers)
    begin_s = time.perf_counter()
    link.read(order, stop=ReadStop(), deadline=Deadline.after(TIMEOUT_S))
    return time.perf_counter() - begin_s


def _noise(region: Region) -> None:
    numbers = np.frombuffer(region.buffer, dtype=np.uint64)
    numbers[:] = np.random.default_rng(1).integers(0, 1 << 63, size=numbers.size, dtype=np.uint64)


if __name__ == "__main__":
    main()
