"""Which transport two ends agree on, and what they say of it."""

import dataclasses

import pytest

from disaggregated.errors import (
    ConfigError,
    TransferError,
)
from kvtransfer import Preference, registry
from kvtransfer.deadline import Deadline
from kvtransfer.source.endpoints import SourceEndpoints
from kvtransfer.transport import Offer
from kvtransfer.transports.tcp import TcpEndpoint
from tests.support.kv_endpoints import make_endpoint
from tests.support.kv_pools import (
    EPOCH,
    SMALL,
    destination,
    regions,
    served_source,
)
from tests.support.kv_transfers import INTO, TABLE, Both, connected


async def test_default_uses_shared_memory_on_one_host_and_says_why() -> None:
    async with connected("DEFAULT") as both:
        landed = await both.destination.pull(both.source.offer("t", TABLE, 24), INTO, deadline_s=20)
        assert landed.transport == "SHM"
        statistics = both.destination.statistics()[0]
        assert (statistics.transport, statistics.why, statistics.fallbacks) == ("SHM", "both ends are on one host", 0)
        assert (statistics.transfers_total, statistics.bytes_total) == (1, landed.num_bytes)


async def test_default_falls_to_tcp_with_a_warning_when_shared_memory_breaks(caplog: pytest.LogCaptureFixture) -> None:
    with regions(SMALL) as (pool, into):
        broken = make_endpoint("SHM", pool, SMALL, epoch=EPOCH + 1)
        endpoints = [broken, make_endpoint("TCP", pool, SMALL)]
        async with served_source(pool, SMALL, endpoints=endpoints) as source, destination(into, SMALL) as landing:
            landed = await landing.pull(source.offer("t", TABLE, 24), INTO, deadline_s=20)
            statistics = landing.statistics()[0]
    assert landed.transport == "TCP"
    assert statistics.fallbacks == 1
    assert "SHM failed: this source is epoch 8" in statistics.why
    assert "kv_transport_fell_back" in caplog.messages


@pytest.mark.parametrize(("backend", "offered"), [("SHM", "TCP"), ("TCP", "SHM")])
async def test_a_configured_transport_never_falls_to_another(backend: str, offered: str) -> None:
    with regions(SMALL) as (pool, into):
        async with (
            served_source(pool, SMALL, preference=Preference(offered)) as source,
            destination(into, SMALL, backend=backend) as landing,
        ):
            with pytest.raises(TransferError, match=f"backend {backend}: {backend} is not offered"):
                await landing.pull(source.offer("t", TABLE, 24), INTO, deadline_s=20)


async def test_a_transport_that_is_none_of_ours_is_refused_at_start() -> None:
    with regions(SMALL, 1) as (into,), pytest.raises(ConfigError, match="MOONCAKE is not part of this product"):
        async with destination(into, SMALL, backend="MOONCAKE"):
            pass


async def test_a_source_left_to_decide_listens_on_what_a_configured_destination_asks_for() -> None:
    with regions(SMALL) as (pool, _):
        only_shared_memory = [registry.load("SHM").make_endpoint(pool, SMALL, epoch=EPOCH, host="127.0.0.1")]
        endpoints = SourceEndpoints(
            only_shared_memory,
            gate=NobodyReads(),
            make=lambda name: registry.load(name).make_endpoint(pool, SMALL, epoch=EPOCH, host="127.0.0.1"),
        )
        endpoints.start()
        assert [offer.name for offer in endpoints.offers(["SHM", "TCP"])] == ["SHM"]
        assert [offer.name for offer in endpoints.offers(["TCP"])] == ["TCP"]
        assert [offer.name for offer in endpoints.offers(["SHM", "TCP"])] == ["SHM", "TCP"]
        assert endpoints.statistics().keys() == {"SHM", "TCP"}
        endpoints.close(deadline=Deadline.after(20))
        assert endpoints.offers([]) == []


class NobodyReads:
    def check_read(self, **_: object) -> None:
        raise AssertionError("nobody reads")


class WithoutHost(TcpEndpoint):
    """Says what an endpoint says that listens on every address."""

    def describe(self) -> Offer:
        offer = super().describe()
        return dataclasses.replace(offer, address=offer.address.removeprefix("127.0.0.1"))


async def test_a_source_that_names_no_host_is_reached_where_its_server_was() -> None:
    with regions(SMALL) as (pool, into):
        async with (
            served_source(pool, SMALL, endpoints=[WithoutHost(pool, SMALL, epoch=EPOCH)]) as source,
            destination(into, SMALL, backend="TCP") as landing,
        ):
            await landing.pull(source.offer("t", TABLE, 24), INTO, deadline_s=20)
            Both(source, into, landing).check_landed(6)
