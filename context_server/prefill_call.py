"""One prompt on its way through a context server: what its caller is told, and when its blocks may go back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from disaggregated import token_logprobs
from disaggregated.engine.api import ChunkComputed, TokensSampled
from disaggregated.errors import DeadlineExceeded, DisaggregatedError
from disaggregated.v1 import control_pb2


class PrefillCall:
    """Filled by the engine's events, read by the one Prefill call it belongs to. Used on the event loop alone.

    Progress is told as the latest value and not as a queue: a caller that reads slowly skips chunks, and nothing grows.

    Invariant: the outcome is told at most once, after every chunk; a failure is told instead of it.
    """

    def __init__(self, engine_id: str, transfer_id: str, *, deadline_s: float) -> None:
        """deadline_s: from now."""
        self.engine_id = engine_id
        self.transfer_id = transfer_id
        """Empty: nobody pulls its blocks, and they go back with the first token."""
        self.is_computed = False
        self.is_told = False
        """The caller has the outcome. When it leaves before, nobody will ever want these blocks."""
        self.reuse: control_pb2.PrefixReuse | None = None
        """What became of the hint who has its beginning; None: there was none."""
        self._arrived_s = time.monotonic()
        self._deadline_s = self._arrived_s + deadline_s
        self._started_s: float | None = None
        self._latest = control_pb2.PrefillProgress()
        self._error: DisaggregatedError | None = None
        self._news = asyncio.Event()

    def chunk_computed(self, event: ChunkComputed) -> None:
        self._started_s = self._started_s or event.started_s
        self._latest.num_computed_tokens = event.num_computed_tokens
        self._latest.num_cached_tokens = event.num_cached_tokens
        self._news.set()

    def first_token_sampled(self, event: TokensSampled) -> None:
        started_s = self._started_s or self._arrived_s
        self._latest.outcome.CopyFrom(
            control_pb2.PrefillOutcome(
                first_token=event.token_ids[0],
                finish_reason=event.finish_reason or "",
                queue_s=max(0.0, started_s - self._arrived_s - (self.reuse.spent_s if self.reuse else 0.0)),
                compute_s=time.monotonic() - started_s,
                logprobs=token_logprobs.to_proto(event.logprobs),
                prompt_logprobs=token_logprobs.to_proto(event.prompt_logprobs),
                reuse=self.reuse,
            )
        )
        self.is_computed = True
        self._news.set()

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    def fail(self, error: DisaggregatedError) -> None:
        """The first failure is the one that is told; later ones follow from it."""
        self._error = self._error or error
        self._news.set()

    async def progress(self) -> AsyncIterator[control_pb2.PrefillProgress]:
        """The latest chunk each time there is a new one; the outcome comes with the last.

        Raises:
            DeadlineExceeded: there was no outcome in time.
            DisaggregatedError: the prefill failed.
        """
        while True:
            await self._next_news()
            if self._error is not None:
                raise self._error
            progress = control_pb2.PrefillProgress()
            progress.CopyFrom(self._latest)
            is_last = self.is_computed
            yield progress
            if is_last:
                self.is_told = True
                return

    async def _next_news(self) -> None:
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + self._deadline_s - time.monotonic()):
                await self._news.wait()
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"{self._latest.num_computed_tokens} tokens of the prompt computed in time"
            ) from error
        self._news.clear()
