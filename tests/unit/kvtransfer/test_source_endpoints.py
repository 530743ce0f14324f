"""Ways into a pool that are added while the source serves."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from disaggregated.errors import TransferError
from kvtransfer.deadline import Deadline
from kvtransfer.source.endpoints import SourceEndpoints
from kvtransfer.transport import EndpointStatistics, Offer, ReadGate


class SlowEndpoint:
    """Takes as long to start as the test lets it: a library that looks for its devices, a world that gathers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_starting, self.may_start, self.is_closed = threading.Event(), threading.Event(), threading.Event()

    def start(self, gate: ReadGate) -> None:
        self.is_starting.set()
        assert self.may_start.wait(20), "the test forgot to let it start"

    def describe(self) -> Offer:
        return Offer(name=self.name, address="nowhere/00")

    def close(self, *, deadline: Deadline) -> None:
        self.is_closed.set()

    def statistics(self) -> EndpointStatistics:
        return EndpointStatistics()


class Gate:
    def check_read(self, **_: object) -> None: ...


def endpoints_adding(slow: SlowEndpoint) -> SourceEndpoints:
    quick = SlowEndpoint("QUICK")
    quick.may_start.set()
    made = SourceEndpoints([quick], gate=Gate(), make=lambda name: slow if name == slow.name else None)
    made.start()
    return made


def test_whoever_only_looks_does_not_wait_for_an_endpoint_that_starts() -> None:
    slow = SlowEndpoint("SLOW")
    endpoints = endpoints_adding(slow)
    with ThreadPoolExecutor(2) as threads:
        asked = threads.submit(endpoints.offers, ["SLOW", "QUICK"])
        try:
            assert slow.is_starting.wait(10)
            looked = threads.submit(endpoints.statistics)
            assert looked.result(timeout=20).keys() == {"QUICK"}
        finally:
            slow.may_start.set()
        assert [offer.name for offer in asked.result(timeout=10)] == ["SLOW", "QUICK"]
    endpoints.close(deadline=Deadline.after(20))


def test_an_endpoint_that_starts_while_its_source_closes_is_closed_too() -> None:
    slow = SlowEndpoint("SLOW")
    endpoints = endpoints_adding(slow)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(endpoints.offers, ["SLOW"])
        assert slow.is_starting.wait(10)
        endpoints.close(deadline=Deadline.after(20))
        slow.may_start.set()
        assert asked.result(timeout=10) == []
    assert slow.is_closed.is_set()


def test_an_endpoint_that_cannot_start_is_not_offered_and_harms_no_other() -> None:
    class Failing(SlowEndpoint):
        def start(self, gate: ReadGate) -> None:
            raise TransferError("no device")

    endpoints = endpoints_adding(Failing("SLOW"))
    assert [offer.name for offer in endpoints.offers(["SLOW", "QUICK"])] == ["QUICK"]
    endpoints.close(deadline=Deadline.after(20))


@pytest.mark.parametrize("speakable", [[], ["UNKNOWN"]])
def test_what_nobody_makes_is_not_offered(speakable: list[str]) -> None:
    endpoints = endpoints_adding(SlowEndpoint("SLOW"))
    assert endpoints.offers(speakable) == []
    endpoints.close(deadline=Deadline.after(20))
