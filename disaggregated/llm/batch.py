"""The sequences of one call, given to the engine a window at a time.

A call may bring a hundred thousand prompts; the engine's own queues are bounded. So only `window` sequences are there
at once, which is more than a step takes, and each that ends makes room for the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as SequenceOf
from types import TracebackType
from typing import Self

from disaggregated.engine.api import EngineEvent
from disaggregated.engine.thread import EngineThread
from disaggregated.llm.event_router import Deliver, EventRouter
from disaggregated.llm.sequence import Sequence


class Batch:
    """A `with` block: whatever is not over at its end is cancelled, so that an error or Ctrl-C leaves nothing behind.

    Invariant: a sequence is waiting here, or running in the engine, or over.
    """

    def __init__(
        self,
        sequences: SequenceOf[Sequence],
        *,
        engine: EngineThread,
        router: EventRouter,
        deliver: Deliver,
        window: int,
    ) -> None:
        self._waiting = deque(sequences)
        self._running: dict[str, Sequence] = {}
        self._engine = engine
        self._router = router
        self._deliver = deliver
        self._window = window

    def __enter__(self) -> Self:
        try:
            self._fill_window()
        except BaseException:
            self._cancel_running()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cancel_running()

    @property
    def is_over(self) -> bool:
        return not self._running and not self._waiting

    def take(self, event: EngineEvent) -> Sequence | None:
        """Apply one delivered event; the sequence that it was for, unless that ended meanwhile.

        Raises:
            DisaggregatedError: the sequence failed, or the next one could not be submitted.
        """
        sequence = self._running.get(event.request_id)
        if sequence is None:
            return None
        sequence.take(event)
        if sequence.is_over:
            self._let_go(sequence)
            self._fill_window()
        return sequence

    def _fill_window(self) -> None:
        while self._waiting and len(self._running) < self._window:
            sequence = self._waiting.popleft()
            request_id = sequence.request.request_id
            self._router.open(request_id, self._deliver)
            self._running[request_id] = sequence
            self._engine.submit(sequence.request)

    def _let_go(self, sequence: Sequence) -> None:
        """A stop string ends a sequence that the engine would go on with; for any other, cancelling does nothing."""
        del self._running[sequence.request.request_id]
        self._router.close(sequence.request.request_id)
        self._engine.cancel(sequence.request.request_id)

    def _cancel_running(self) -> None:
        for sequence in list(self._running.values()):
            self._let_go(sequence)
        self._waiting.clear()
