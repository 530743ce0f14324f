"""Which transports a destination makes, and when."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from disaggregated.errors import TransferError
from kvtransfer import registry
from kvtransfer.destination.our_transports import OurTransports
from kvtransfer.negotiate import Preference
from kvtransfer.registry import Listed
from kvtransfer.transport import OurEnd
from tests.support.kv_pools import SMALL, regions

BROKEN = Listed(name="BROKEN", module="tests.support.broken_transport", extra=None, carries="nothing")


@pytest.fixture
def us() -> Iterator[OurEnd]:
    with regions(SMALL) as (_, into):
        yield OurEnd(region=into, layout=SMALL, peer_id="generation-0")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(registry.TRANSPORTS, BROKEN.name, BROKEN)
    return BROKEN.name


def test_the_one_that_is_configured_is_made_at_once_and_kept(us: OurEnd) -> None:
    ours = OurTransports(us, Preference("TCP"))
    assert list(ours._made) == ["TCP"]
    assert ours.get("TCP") is ours.get("TCP")


def test_with_nothing_configured_each_is_made_when_it_is_needed(us: OurEnd) -> None:
    ours = OurTransports(us, Preference())
    assert ours._made == {}
    assert ours.get("SHM").name == "SHM"


def test_a_configured_one_that_cannot_be_made_is_an_error_at_the_start(us: OurEnd, broken: str) -> None:
    with pytest.raises(TransferError, match="its library cannot be loaded"):
        OurTransports(us, Preference(broken))


def test_with_fallback_it_is_an_error_for_whoever_asks_for_it(us: OurEnd, broken: str) -> None:
    ours = OurTransports(us, Preference(broken, fallback=True))
    with pytest.raises(TransferError, match="its library cannot be loaded"):
        ours.get(broken)
    assert ours.get("TCP").name == "TCP"
