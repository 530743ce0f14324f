import pytest

from disaggregated.errors import ConfigError, TransferError
from kvtransfer import check_backend
from kvtransfer.negotiate import NOT_BUILT, candidates, speakable
from kvtransfer.transport import Offer

SHM = Offer(name="SHM", address="a/00", host_key="this-host")
TCP = Offer(name="TCP", address="127.0.0.1:1/00")


def chosen(backend: str, *offers: Offer, host: str = "this-host") -> list[tuple[str, str]]:
    return [(each.offer.name, each.why) for each in candidates(backend, offers, our_host_key=host)]


def test_default_is_shared_memory_on_one_host_with_tcp_behind_it() -> None:
    assert chosen("DEFAULT", TCP, SHM) == [
        ("SHM", "both ends are on one host"),
        ("TCP", "the best that both ends have"),
    ]


@pytest.mark.parametrize("host", ["another-host", ""])
def test_default_is_tcp_between_hosts_and_says_why_it_is_not_shared_memory(host: str) -> None:
    assert chosen("DEFAULT", SHM, TCP, host=host) == [
        ("TCP", "the best that both ends have; SHM needs both ends on one host")
    ]


def test_a_configured_transport_has_nothing_behind_it() -> None:
    assert chosen("TCP", SHM, TCP) == [("TCP", "configured")]
    assert chosen("SHM", SHM, TCP) == [("SHM", "configured")]


def test_a_configured_transport_that_cannot_be_used_is_named() -> None:
    with pytest.raises(
        TransferError, match=r"backend SHM: SHM needs both ends on one host \(the source offers SHM, TCP"
    ):
        chosen("SHM", SHM, TCP, host="another-host")
    with pytest.raises(TransferError, match="backend TCP: TCP is not offered by the source"):
        chosen("TCP", SHM)
    with pytest.raises(TransferError, match="the source offers nothing"):
        chosen("DEFAULT")


@pytest.mark.parametrize("name", [*NOT_BUILT, "tcp", "RDMA"])
def test_a_backend_that_is_not_there_is_refused_with_what_is(name: str) -> None:
    with pytest.raises(ConfigError, match=f"cache_transceiver_config.backend: {name} .*available: DEFAULT, SHM, TCP"):
        check_backend(name)


@pytest.mark.parametrize("name", ["DEFAULT", "SHM", "TCP"])
def test_a_backend_that_is_there_is_speakable(name: str) -> None:
    check_backend(name)
    assert speakable(name)
