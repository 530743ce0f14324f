"""What a source says wrongly costs one transfer, in words, and never the process that listens to it."""

from __future__ import annotations

import errno
import socket
from typing import Any

import pytest

from disaggregated.errors import DisaggregatedError, LeaseExpired, PeerLost, QueueFull, TransferError
from disaggregated.kv_layout import KVLayout
from kvtransfer import Region
from kvtransfer.deadline import Deadline
from kvtransfer.destination.peer import source_errors
from kvtransfer.transport import Offer, OurEnd, SourceIdentity
from kvtransfer.transports.tcp import TcpEndpoint, TcpTransport

LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_size=4, dtype="float32", num_blocks=2)
SOURCE = SourceIdentity(instance_id="source", epoch=1, layout=LAYOUT)


@pytest.mark.parametrize("place", ["127.0.0.1:99999", f"{'a' * 64}.example:1", "a\0b:1"])
def test_an_offer_of_no_possible_address_is_a_lost_peer(place: str) -> None:
    with Region.allocate(LAYOUT.pool_bytes) as region:
        transport = TcpTransport(OurEnd(region=region, layout=LAYOUT, peer_id="us"))
        with pytest.raises(PeerLost, match="no TCP connection"):
            transport.connect(Offer(name="TCP", address=f"{place}/{'0' * 32}"), SOURCE, deadline=Deadline.after(20))


@pytest.mark.parametrize(
    "raised", [QueueFull("4096 transfers are followed"), DisaggregatedError("unexpected KeyError")]
)
def test_whatever_a_source_raises_is_a_transfer_error_that_may_be_tried_elsewhere(raised: DisaggregatedError) -> None:
    with pytest.raises(TransferError, match=str(raised)) as caught, source_errors("host:1"):
        raise raised
    assert caught.value.retryable


def test_a_transfer_error_of_the_source_keeps_its_class() -> None:
    with pytest.raises(LeaseExpired), source_errors("host:1"):
        raise LeaseExpired("over")


def test_an_endpoint_accepts_again_after_it_could_not(monkeypatch: pytest.MonkeyPatch) -> None:
    accept, failures = socket.socket.accept, [OSError(errno.EMFILE, "too many open files")]

    def failing_once(listening: socket.socket) -> tuple[socket.socket, Any]:
        if failures:
            raise failures.pop()
        return accept(listening)

    class Gate:
        def check_read(self, **_: object) -> None: ...

    monkeypatch.setattr(socket.socket, "accept", failing_once)
    with Region.allocate(LAYOUT.pool_bytes) as region:
        endpoint = TcpEndpoint(region, LAYOUT, epoch=1)
        endpoint.start(Gate())
        try:
            transport = TcpTransport(OurEnd(region=region, layout=LAYOUT, peer_id="us"))
            link = transport.connect(endpoint.describe(), SOURCE, deadline=Deadline.after(20))
            link.close(deadline=Deadline.after(20))
        finally:
            endpoint.close(deadline=Deadline.after(20))
