"""One attempt at a request: `Admit` goes to the generation server and `Prefill` to the context server at the same time.

The first token comes back from the context server, so that the transfer is not in the time to first token; the others
come on the generation server's link. Whatever fails ends the attempt as a whole: both halves are cancelled, and the
run decides whether there is another one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from disaggregated import rpc
from disaggregated.errors import AdmissionError, DisaggregatedError, ServerLost, TransferError, TransferTimeout
from disaggregated.request_life import Phase
from disaggregated.v1 import control_pb2
from orchestrator.generation_link import GenerationLink
from orchestrator.request_run import RequestRun
from orchestrator.routing.placement import Placement
from orchestrator.server import Server, Share
from orchestrator.story import AttemptStory
from orchestrator.token_order import Arrival, TokenOrder, arrival_of

TRANSFER_TIMEOUT_S: Final = 30.0
"""From the first token to the landing of the last block: after that long the transfer between two live servers is
stuck. A sequence that has landed and waits for its turn in the batch has until the request's deadline."""

SETTLED_MASK: Final = 31
"""Of a position: when it has none of these bits, the books of a sequence in flow are brought up to date."""


class Attempt:
    """Holds a share of each of its servers from the moment it is made until `give_back()`."""

    def __init__(
        self,
        run: RequestRun,
        placement: Placement,
        key: int,
        *,
        clock: Callable[[], float],
        on_room: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_room` is called when the context server may take another request, while this one goes on."""
        self.placement = placement
        self.hint: control_pb2.PrefixHint | None = None
        """Who holds more of the prompt than our context server does."""
        self.culprits: set[str] = set()
        """Instances to stay away from next time."""
        self._run = run
        self._key = key
        self._clock = clock
        self._on_room = on_room
        self._token_ids = run.token_ids
        sampling = run.sampling
        self._sampling = sampling.to_proto()
        self._order = TokenOrder(len(self._token_ids), sampling)
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._held_back: set[Server] = set()
        self._landing_timer: asyncio.TimerHandle | None = None
        self._has_landed = False
        self._is_over_there = False
        self._has_outcome = False
        self._flow_position = -1
        """Of the token that is due, while tokens come one by one and nothing else does; -1: they do not."""
        self._settled_position = -1
        """Up to which the books are up to date."""
        self._last_position = len(run.request.token_ids) + run.request.sampling.max_tokens - 1
        self._last_token_s = self._longest_gap_s = 0.0
        self._emitted = run.emitted
        self._push_token = run.push_token
        self._link: GenerationLink | None = None
        self._stream_key = 0
        """Of our place on the link; 0: none was taken."""
        self._stop_prefill: Callable[[], None] = lambda: None
        self.story = AttemptStory(
            context_instance=placement.context.instance_id if placement.context else "",
            generation_instance=placement.generation.instance_id if placement.generation else "",
            why=placement.why,
            decision=placement.decision,
        )
        self._shares = [
            (server, self._take(server)) for server in (placement.context, placement.generation) if server is not None
        ]

    def _take(self, server: Server) -> Share:
        num_tokens = len(self._token_ids)
        prefills_here = self.placement.context in (server, None)
        share = Share(
            num_tokens=num_tokens,
            num_prefill_tokens=num_tokens - (self.placement.decision.num_cached_tokens or 0) if prefills_here else 0,
            num_blocks=-(-(num_tokens + 1) // server.block_size),
            on_lost=self._context_lost if server is self.placement.context else self.on_lost,
        )
        server.take(self._key, share)
        return share

    def give_back(self) -> None:
        for server, _ in self._shares:
            server.give_back(self._key, makes_room=server not in self._held_back)
        self._shares = []
        if self._landing_timer is not None:
            self._landing_timer.cancel()
        if self._ended.done() and not self._ended.cancelled():
            self._ended.exception()  # whoever awaited the attempt was told by another failure before

    async def go(self) -> None:
        """Until the request is over. The caller gives the shares back, however this ends.

        Raises:
            DisaggregatedError: the attempt came to nothing more; what it delivered is in the run.
        """
        self.story.began_s = now_s = self._clock()
        self._run.story.attempts.append(self.story)
        self._run.life.advance(Phase.PREFILLING, now_s=now_s)
        try:
            self._begin(self.placement.context, self.placement.generation)
            await self._ended
        finally:
            self._end_calls()

    def _begin(self, context: Server | None, generation: Server | None) -> None:
        """Both halves leave at once, and tell what they bring by calling us."""
        if generation is not None:
            if generation.link is None:
                raise ServerLost(f"{self.story.generation_instance} was lost")
            self._link = generation.link
            self._stream_key = generation.link.open(self)
        if context is not None:
            self._begin_prefill(context)
        if generation is not None and self._link is not None:
            self._admit(self._link)

    def _end_calls(self) -> None:
        """Nothing that still comes matters; servers that have not ended this by themselves are told."""
        self._leave_flow()
        self._stop_prefill()
        self._abort_transfer()
        if self._link is not None and self._stream_key:
            self._link.close(self._stream_key, is_over=self._is_over_there)

    # The context server's half.

    def _begin_prefill(self, context: Server) -> None:
        if context.client is None:
            raise ServerLost(f"{self.story.context_instance} was lost")
        request = control_pb2.PrefillRequest(
            request_id=self._wire_id,
            transfer_id=self._wire_id if self.placement.generation is not None else "",
            token_ids=self._token_ids,
            sampling=self._sampling,
            deadline_s=self._seconds_left(),
            priority=self._run.request.priority,
            cache_salt=self._run.request.cache_salt,
            reuse_from=self.hint,
        )
        try:
            self._stop_prefill = context.client.begin_prefill(request, self)
        except ServerLost as error:
            self.on_prefill_over(error)

    def on_progress(self, progress: control_pb2.PrefillProgress) -> None:
        if self._ended.done():
            return
        share = self._shares[0][1]
        share.num_prefill_tokens = max(0, len(self._token_ids) - progress.num_computed_tokens)
        self.story.num_cached_tokens = progress.num_cached_tokens
        if progress.HasField("outcome"):
            self._has_outcome = True
            self._prefilled(progress.outcome)

    def on_prefill_over(self, error: DisaggregatedError | None) -> None:
        context = self.placement.context
        assert context is not None, "a local prefill has no context server"
        if error is None and not self._has_outcome:
            error = ServerLost(f"{self.story.context_instance} ended a prefill without its first token")
        if error is None or self._ended.done():
            return
        self._hold_back(context, error)
        if self._needs_context:
            self._fail(error)

    def _prefilled(self, outcome: control_pb2.PrefillOutcome) -> None:
        self.story.reuse_from = self.hint.instance_id if self.hint is not None else ""
        self.story.prefilled(outcome)
        self._learn_speed(self.placement.context)
        arrival = Arrival(
            len(self._token_ids),
            [outcome.first_token],
            outcome.finish_reason,
            outcome.logprobs if outcome.HasField("logprobs") else None,
            outcome.prompt_logprobs if outcome.HasField("prompt_logprobs") else None,
        )
        self._arrived(arrival, self._clock())

    def _learn_speed(self, server: Server | None) -> None:
        """What the next prompts there are estimated by."""
        story, num_tokens = self.story, len(self._token_ids)
        if server is not None and story.num_cached_tokens < num_tokens:
            num_cached, seconds = story.num_cached_tokens, story.prefill_compute_s
            server.speed.prompt_took(num_tokens=num_tokens, num_cached=num_cached, seconds=seconds)

    def _abort_transfer(self) -> None:
        """Unless they have landed, the blocks of this prompt wait for a reader that will not come.

        The generation server, when it lives, tells the same; but it may be what was lost, or have refused the request
        before it knew of a transfer.
        """
        context = self.placement.context
        if context is None or self.placement.generation is None or self._has_landed:
            return
        if context.aborts is not None:
            context.aborts.add(self._wire_id)

    def _context_lost(self, error: ServerLost) -> None:
        self.culprits.add(self.story.context_instance)
        if self._needs_context:
            self._fail(error)

    @property
    def _needs_context(self) -> bool:
        """Its blocks are still to come, or its first token, which nobody else tells."""
        return not self._has_landed or self._order.position == len(self._token_ids)

    # The generation server's half.

    def _admit(self, link: GenerationLink) -> None:
        request = control_pb2.AdmitRequest(
            orchestrator_id=link.link_id,
            stream_key=self._stream_key,
            request_id=self._wire_id,
            token_ids=self._token_ids,
            sampling=self._sampling,
            deadline_s=self._seconds_left(),
            source=self._ticket(),
            priority=self._run.request.priority,
            cache_salt=self._run.request.cache_salt,
        )
        try:
            link.admit(request)
        except ServerLost as error:
            self.on_refused(error)

    def on_refused(self, error: DisaggregatedError) -> None:
        """The generation server did not admit it."""
        generation = self.placement.generation
        assert generation is not None, "nobody was asked to admit it"
        if self._ended.done():
            return
        self._is_over_there = isinstance(error, AdmissionError)
        self._hold_back(generation, error)
        self._fail(error)

    def _hold_back(self, server: Server, error: DisaggregatedError) -> None:
        """A server that failed to take one request would fail the next one too, and at once."""
        server.hold_back()
        self._held_back.add(server)
        if not isinstance(error, AdmissionError):
            self.culprits.add(server.instance_id)

    def _ticket(self) -> control_pb2.TransferTicket | None:
        context = self.placement.context
        if context is None:
            return None
        return control_pb2.TransferTicket(
            address=context.address,
            instance_id=context.description.instance_id,
            epoch=context.description.epoch,
            transfer_id=self._wire_id,
        )

    def on_delta(self, delta: control_pb2.StreamDelta, now_s: float) -> None:
        if delta.HasField("times"):
            self._has_landed = True
            self.story.admitted(delta.times)
            if self.placement.context is None:
                self._learn_speed(self.placement.generation)
        if delta.HasField("error"):
            self._is_over_there = True
            self._refused_later(rpc.from_stream_error(delta.error))
            return
        self._has_landed = True
        if not delta.token_ids and not delta.finish_reason:
            return  # Its blocks are there, and it waits for its turn in the batch.
        if delta.finish_reason:
            self._is_over_there = True
        self._arrived(arrival_of(delta), now_s)

    def on_token(self, position: int, token_id: int, now_s: float) -> None:
        """The ways of most tokens are short: what one of them touches is here, and in its sink.

        Memory costs more than counting: a server's streams take turns, and each finds its books out of the cache. So
        those of the run, of the stories and of the shares are brought up to date now and then.
        """
        if position != self._flow_position or position == self._last_position:
            self._leave_flow()
            self._has_landed = True
            self._arrived(Arrival(position, [token_id]), now_s)
            return
        self._flow_position = position + 1
        if (gap_s := now_s - self._last_token_s) > self._longest_gap_s:
            self._longest_gap_s = gap_s
        self._last_token_s = now_s
        self._emitted.append(token_id)
        if not position & SETTLED_MASK:
            self._settle()
        if not self._push_token(token_id):
            self._run.story.finish_reason = "stop"
            self._finish(now_s)

    def _enter_flow(self) -> None:
        """Its first tokens came, it decodes, and no server was lost since."""
        story = self._run.story
        self._flow_position = self._settled_position = self._order.position
        self._last_token_s, self._longest_gap_s = story.last_token_s, story.longest_gap_s

    def _settle(self) -> None:
        """Bring the books up to date."""
        num_tokens = self._flow_position - self._settled_position
        self._settled_position = self._order.position = self._flow_position
        self.story.num_tokens += num_tokens
        for _, share in self._shares:
            share.num_tokens += num_tokens
        story = self._run.story
        story.num_tokens += num_tokens
        story.last_token_s, story.longest_gap_s = self._last_token_s, self._longest_gap_s

    def _leave_flow(self) -> None:
        if self._flow_position >= 0:
            self._settle()
            self._flow_position = -1

    def _finish(self, now_s: float) -> None:
        self._leave_flow()
        self._run.life.advance(Phase.FINISHED, now_s=now_s)
        self._ended.set_result(None)

    def _refused_later(self, error: DisaggregatedError) -> None:
        if isinstance(error, TransferError):
            self.culprits.add(self.story.context_instance)
        elif not isinstance(error, AdmissionError):
            self.culprits.add(self.story.generation_instance)
        self._fail(error)

    def on_lost(self, error: ServerLost) -> None:
        self.culprits.add(self.story.generation_instance)
        self._fail(error)

    # Both halves.

    def _arrived(self, arrival: Arrival, now_s: float) -> None:
        self._leave_flow()
        if self._ended.done():
            return
        try:
            due = self._order.arrive(arrival)
        except ServerLost as error:
            self.culprits.add(self.story.generation_instance)
            self._fail(error)
            return
        if due is None:
            return
        for server, share in self._shares:
            share.num_tokens += len(due.token_ids)
            share.num_prefill_tokens = 0
            share.is_decoding = server is self.placement.generation
        life = self._run.life
        if life.phase is Phase.TRANSFERRING:
            life.advance(Phase.DECODING, now_s=now_s)
        if self._run.deliver(due, now_s=now_s):
            self._finish(now_s)
        elif life.phase is Phase.PREFILLING and self._has_landed:
            life.advance(Phase.DECODING, now_s=now_s)
        elif life.phase is Phase.PREFILLING:
            life.advance(Phase.TRANSFERRING, now_s=now_s)
            self._landing_timer = asyncio.get_running_loop().call_later(TRANSFER_TIMEOUT_S, self._not_landed)
        if life.phase is Phase.DECODING:
            self._enter_flow()
        if len(self._shares) == 2 and not self._needs_context:
            self._let_context_go()

    def _let_context_go(self) -> None:
        """It has done its part: what it could serve at once is no longer bounded by how long answers are."""
        context, _ = self._shares.pop(0)
        context.give_back(self._key, makes_room=context not in self._held_back)
        self._on_room()

    def _not_landed(self) -> None:
        if not self._has_landed:
            self.culprits.add(self.story.context_instance)
            self._fail(TransferTimeout(f"the KV had not landed {TRANSFER_TIMEOUT_S:g} s after the first token"))

    def _fail(self, error: DisaggregatedError) -> None:
        if not self._ended.done():
            self._leave_flow()
            self._ended.set_exception(error)

    @property
    def _wire_id(self) -> str:
        """Unlike the client's own id, never used twice: an attempt must not meet the remains of an earlier one."""
        return f"{self._run.request.request_id}.{self._key:x}"

    def _seconds_left(self) -> float:
        return max(0.001, self._run.request.deadline_s - self._clock())
