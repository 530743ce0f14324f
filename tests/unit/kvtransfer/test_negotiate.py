"""Which transport two ends use: configured names are kept to, DEFAULT takes the best, and every refusal says why."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from disaggregated.errors import ConfigError, TransferError
from kvtransfer import Preference, negotiate, registry
from kvtransfer.negotiate import BEST_FIRST, available, candidates
from kvtransfer.registry import FOREIGN, TRANSPORTS, Listed
from kvtransfer.transport import Offer

SHM = Offer(name="SHM", address="a/00", host_key="this-host")
TCP = Offer(name="TCP", address="127.0.0.1:1/00")
GONE = Offer(name="NIXL", address="127.0.0.1:2/00")
LACKS = "needs the gone package: pip install 'disaggregated[gone]'"


@pytest.fixture
def nixl_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transport of the table whose package is not installed."""
    module = ModuleType("tests_gone_transport")
    module.missing = lambda: LACKS  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    listed = Listed(name="NIXL", module=module.__name__, extra="gone", carries="nothing")
    monkeypatch.setattr(registry, "TRANSPORTS", {**TRANSPORTS, "NIXL": listed})


def chosen(preference: Preference, *offers: Offer, host: str = "this-host") -> list[tuple[str, str]]:
    return [(each.offer.name, each.why) for each in candidates(preference, offers, our_host_key=host)]


def test_default_is_shared_memory_on_one_host_with_tcp_behind_it() -> None:
    assert chosen(Preference(), TCP, SHM) == [
        ("SHM", "both ends are on one host"),
        ("TCP", "the best that both ends have"),
    ]


@pytest.mark.parametrize("host", ["another-host", ""])
def test_default_is_tcp_between_hosts_and_says_why_it_is_not_shared_memory(host: str) -> None:
    assert chosen(Preference(), SHM, TCP, host=host) == [
        ("TCP", "the best that both ends have; SHM needs both ends on one host")
    ]


@pytest.mark.parametrize("name", ["SHM", "TCP"])
def test_a_configured_transport_has_nothing_behind_it(name: str) -> None:
    assert chosen(Preference(name), SHM, TCP) == [(name, "configured")]
    assert Preference(name).offered() == (name,)


def test_a_configured_transport_with_fallback_is_only_the_first_of_all() -> None:
    assert [name for name, _ in chosen(Preference("TCP", fallback=True), SHM, TCP)] == ["TCP", "SHM"]
    assert Preference("TCP", fallback=True).offered() == ("TCP", "SHM")


def test_a_configured_transport_that_cannot_be_used_is_named() -> None:
    with pytest.raises(
        TransferError, match=r"backend SHM: SHM needs both ends on one host \(the source offers SHM, TCP"
    ):
        chosen(Preference("SHM"), SHM, TCP, host="another-host")
    with pytest.raises(TransferError, match="backend TCP: TCP is not offered by the source"):
        chosen(Preference("TCP"), SHM)
    with pytest.raises(TransferError, match="the source offers nothing"):
        chosen(Preference())


@pytest.mark.parametrize("name", [*FOREIGN, "tcp", "RDMA"])
@pytest.mark.parametrize("fallback", [False, True])
def test_a_name_that_is_no_transport_of_ours_is_refused_with_those_that_are(name: str, fallback: bool) -> None:
    with pytest.raises(ConfigError, match=f"cache_transceiver_config.backend: {name} is .*available: DEFAULT, SHM"):
        Preference(name, fallback).check()


@pytest.mark.usefixtures("nixl_is_missing")
def test_a_transport_without_its_package_is_refused_with_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"backend: NIXL needs the gone package: pip install .*fallback: true"):
        Preference("NIXL").check()
    assert "NIXL" not in available()


@pytest.mark.usefixtures("nixl_is_missing")
def test_with_fallback_a_missing_package_is_told_and_the_next_best_is_used() -> None:
    preference = Preference("NIXL", fallback=True)
    assert preference.check() == LACKS
    assert preference.offered() == ("SHM", "TCP")
    ((name, why), *_) = chosen(preference, SHM, TCP, GONE)
    assert name == "SHM"
    assert f"NIXL {LACKS}" in why


@pytest.mark.usefixtures("nixl_is_missing")
def test_default_leaves_out_what_is_missing_here_whatever_the_source_offers() -> None:
    assert [name for name, _ in chosen(Preference(), GONE, TCP, SHM)] == ["SHM", "TCP"]
    with pytest.raises(TransferError, match="NIXL needs the gone package"):
        chosen(Preference(), GONE)


def test_a_source_left_to_decide_may_add_what_a_destination_asks_for_but_a_configured_one_may_not(
    nixl_is_missing: None,
) -> None:
    assert Preference().may_add("TCP")
    assert not Preference("SHM").may_add("TCP")
    assert Preference("SHM", fallback=True).may_add("TCP")
    assert not Preference().may_add("NIXL")
    assert not Preference().may_add("RDMA")


@pytest.mark.parametrize("devices", [(), ("mlx5_0",)])
def test_a_network_card_is_used_unasked_by_one_library_that_is_installed(
    devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(negotiate, "fabric_devices", lambda: devices)
    offered = Preference().offered()
    assert offered[0] == "SHM"
    assert offered[-1] == "TCP"
    fabric = [name for name in ("NIXL", "UCX") if name in TRANSPORTS and registry.missing(name) is None]
    assert list(offered[1:-1]) == (fabric[:1] if devices else [])


@pytest.mark.parametrize("name", TRANSPORTS)
def test_every_listed_transport_is_a_module_that_loads_without_its_library(name: str) -> None:
    before = set(sys.modules)
    module = registry.load(name)
    assert name == module.NAME
    assert callable(module.make_endpoint)
    assert callable(module.make_transport)
    assert name in BEST_FIRST
    libraries = {"ucxx", "nixl_cu12", "mpi4py", "torch"}
    assert not libraries & (set(sys.modules) - before)
    assert name in available() or registry.missing(name)
