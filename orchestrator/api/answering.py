"""What answers one request without a task: it is begun by a call, and ended by whoever brings the end."""

from __future__ import annotations

from abc import ABC, abstractmethod

from disaggregated.errors import DisaggregatedError
from orchestrator.front_door import FrontDoor
from orchestrator.http.exchange import Exchange
from orchestrator.request_run import RequestRun, TokenRequest, TokenSink
from orchestrator.story import RequestStory


class Answering(ABC):
    """It is over when the exchange is. What it holds is freed then: it and its run have each other until the end, and
    no longer."""

    __slots__ = ("_door", "_exchange", "_request", "_run")

    def __init__(self, door: FrontDoor, exchange: Exchange, request: TokenRequest) -> None:
        self._door = door
        self._exchange = exchange
        self._request = request
        self._run: RequestRun | None = None

    def _begin(self, sink: TokenSink) -> None:
        """Raises as `Dispatcher.begin`."""
        exchange = self._exchange
        exchange.on_gone = self._gone
        run = self._door.dispatcher.begin(self._request, sink, self._over)
        if exchange.on_gone is not None:  # Else it is over already.
            self._run = run

    def _gone(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            self._door.dispatcher.cancel(run)

    def _over(self, story: RequestStory, error: DisaggregatedError | None) -> None:
        """Somebody else's tokens may be on their way through the same call: nothing that is wrong here stops them."""
        self._run = None
        try:
            self._end(story, error)
        except Exception as crash:  # noqa: BLE001 - one request's bug is one 500 and a traceback
            self._exchange.refuse(crash)

    @abstractmethod
    def _end(self, story: RequestStory, error: DisaggregatedError | None) -> None:
        """Answer it, or refuse it."""
