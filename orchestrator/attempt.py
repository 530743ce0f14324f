"""One attempt at a request: `Admit` goes to the generation server and `Prefill` to the context server at the same time.

The first token comes back from the context server, so that the transfer is not in the time to first token; the others
come on the generation server's link. Whatever fails ends the attempt as a whole: both halves are cancelled, and its
owner decides whether there is another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from disaggregated import rpc
from disaggregated.errors import AdmissionError, DisaggregatedError, ServerLost, TransferError, TransferTimeout
from disaggregated.request_life import Phase
from disaggregated.v1 import control_pb2
from orchestrator.attempt_calls import AttemptCalls
from orchestrator.fan_out import Lane, Terminal
from orchestrator.generation_link import GenerationLink
from orchestrator.load import Share
from orchestrator.overdue import Overdue
from orchestrator.request_run import RequestRun
from orchestrator.routing.placement import Placement
from orchestrator.server import Server
from orchestrator.story import AttemptStory
from orchestrator.token_flow import TokenFlow
from orchestrator.token_order import Arrival, arrival_of

TRANSFER_TIMEOUT_S: Final = 30.0
"""From the first token to the landing of the last block: after that long the transfer between two live servers is
stuck. A sequence that has landed and waits for its turn in the batch has until the request's deadline."""

# Looked up often: a name of this module costs less than one of an enum.
_PREFILLING: Final = Phase.PREFILLING
_DECODING: Final = Phase.DECODING


class AttemptOwner(Protocol):
    """Called on the event loop, and in the middle of what a server brings for others as well; must not raise."""

    @property
    def clock(self) -> Callable[[], float]:
        """Monotonic seconds."""

    @property
    def landings(self) -> Overdue[Attempt]:
        """Of attempts whose blocks are on their way; tells `not_landed` of those that are stuck."""

    def attempt_over(self, attempt: Attempt, error: DisaggregatedError | None) -> None:
        """Once, unless it was stopped; None: the request is over. It holds nothing any more."""

    def room_came(self) -> None:
        """The context server may take another request, while this one goes on."""


class Attempt(TokenFlow):
    """Holds a share of each of its servers from the moment it is made until it is over or stopped."""

    __slots__ = (
        "_calls", "_context_share", "_has_outcome", "_held_back", "_is_over_there", "_key", "_link", "_owner",
        "_stop_prefill", "_stream_key", "culprits", "hint", "placement",
    )  # fmt: skip

    def __init__(self, run: RequestRun, placement: Placement, key: int, owner: AttemptOwner) -> None:
        context, generation = placement.context, placement.generation
        story = AttemptStory(
            context_instance=context.instance_id if context is not None else "",
            generation_instance=generation.instance_id if generation is not None else "",
            decision=placement.decision,
        )
        super().__init__(run, story)
        self.placement = placement
        self.hint: control_pb2.PrefixHint | None = None
        """Who holds more of the prompt than our context server does."""
        self.culprits: set[str] = set()
        """Instances to stay away from next time."""
        self._key = key
        self._owner = owner
        self._held_back: set[Server] = set()
        self._is_over_there = False
        self._has_outcome = False
        self._link: GenerationLink | None = None
        self._stream_key = 0
        """Of our place on the link; 0: none was taken."""
        self._stop_prefill: Callable[[], None] | None = None
        self._context_share = None if context is None else self._take(context, self._context_lost, prefills=True)
        if generation is not None:
            self._generation_share = self._take(generation, self.on_lost, prefills=context is None)

    def _take(self, server: Server, on_lost: Callable[[ServerLost], None], *, prefills: bool) -> Share:
        num_tokens = self._num_prompt_tokens
        num_to_prefill = num_tokens - (self.placement.decision.num_cached_tokens or 0) if prefills else 0
        share = Share(num_tokens, num_to_prefill, -(-(num_tokens + 1) // server.block_size), on_lost)
        server.take(self._key, share)
        return share

    def begin(self) -> None:
        """Both halves leave at once, and tell what they bring by calling us. It may be over before this returns."""
        now_s = self._owner.clock()
        run, (context, generation) = self.run, self.placement[:2]
        self.story.began_s = now_s
        run.story.attempts.append(self.story)
        run.life.advance(Phase.PREFILLING, now_s=now_s)
        self._calls = AttemptCalls(
            run,
            f"{run.request.request_id}.{self._key:x}",
            run.sampling.to_proto(),
            max(0.001, run.request.deadline_s - now_s),
        )
        try:
            if generation is not None:
                if generation.link is None:
                    raise ServerLost(f"{self.story.generation_instance} was lost")
                self._stream_key = generation.link.open(self)
                self._link = generation.link
            if context is not None:
                self._begin_prefill(context)
            if self._link is not None and not self._is_over:
                self._admit(self._link)
        except ServerLost as error:
            self._fail(error)

    def stop(self) -> None:
        """Nothing that still comes matters; servers that have not ended this by themselves are told, and the shares
        are given back. Its owner hears nothing more."""
        if self._is_over:
            return
        if self._flow_position >= 0:
            self._leave_flow()
        self._is_over = True
        if self._stop_prefill is not None:
            self._stop_prefill()
            self._stop_prefill = None
        if not self._has_landed:
            self._owner.landings.came(self)
            self._abort_transfer()
        if self._link is not None:
            self._link.close(self._stream_key, is_over=self._is_over_there)
        context, generation = self.placement.context, self.placement.generation
        if self._context_share is not None and context is not None:
            self._give_back(context)
        if generation is not None:
            self._give_back(generation)
        # They would keep us, and we them: nothing of a request is left for the garbage collector to find.
        self._context_share = self._generation_share = None

    def _give_back(self, server: Server) -> None:
        server.give_back(self._key, makes_room=server not in self._held_back)

    # The context server's half.

    def _begin_prefill(self, context: Server) -> None:
        if context.client is None:
            raise ServerLost(f"{self.story.context_instance} was lost")
        request = self._calls.prefill(has_reader=self._generation_share is not None, reuse_from=self.hint)
        try:
            self._stop_prefill = context.client.begin_prefill(request, self)
        except ServerLost as error:
            self.on_prefill_over(error)

    def on_progress(self, progress: control_pb2.PrefillProgress) -> None:
        if self._is_over:
            return
        if self._context_share is not None:
            self._context_share.left_to_prefill(max(0, self._num_prompt_tokens - progress.num_computed_tokens))
        self.story.num_cached_tokens = progress.num_cached_tokens
        if progress.HasField("outcome"):
            self._has_outcome = True
            self._prefilled(progress.outcome)

    def on_prefill_over(self, error: DisaggregatedError | None) -> None:
        self._stop_prefill = None
        context = self.placement.context
        assert context is not None, "a local prefill has no context server"
        if error is None and not self._has_outcome:
            error = ServerLost(f"{self.story.context_instance} ended a prefill without its first token")
        if error is None or self._is_over:
            return
        self._hold_back(context, error)
        if self._needs_context:
            self._fail(error)

    def _prefilled(self, outcome: control_pb2.PrefillOutcome) -> None:
        self.story.prefilled(outcome, reuse_from=self.hint.instance_id if self.hint is not None else "")
        self._learn_speed(self.placement.context)
        now_s = self._owner.clock()
        token_ids = (outcome.first_token,)
        if outcome.HasField("logprobs") or outcome.HasField("prompt_logprobs"):
            logprobs = outcome.logprobs if outcome.HasField("logprobs") else None
            of_prompt = outcome.prompt_logprobs if outcome.HasField("prompt_logprobs") else None
            first = self._num_prompt_tokens
            self._arrived(Arrival(first, token_ids, outcome.finish_reason, logprobs, of_prompt), now_s)
        else:
            self._came(self._num_prompt_tokens, token_ids, outcome.finish_reason, now_s)

    def _learn_speed(self, server: Server | None) -> None:
        """What the next prompts there are estimated by."""
        story, num_tokens = self.story, self._num_prompt_tokens
        if server is not None and story.num_cached_tokens < num_tokens:
            num_cached, seconds = story.num_cached_tokens, story.prefill_compute_s
            server.speed.prompt_took(num_tokens=num_tokens, num_cached=num_cached, seconds=seconds)

    def _abort_transfer(self) -> None:
        """The blocks of this prompt, which have not landed, wait for a reader that will not come.

        The generation server, when it lives, tells the same; but it may be what was lost, or have refused the request
        before it knew of a transfer.
        """
        context = self.placement.context
        if context is not None and self._generation_share is not None and context.aborts is not None:
            context.aborts.add(self._calls.wire_id)

    def _context_lost(self, error: ServerLost) -> None:
        self.culprits.add(self.story.context_instance)
        if self._needs_context:
            self._fail(error)

    @property
    def _needs_context(self) -> bool:
        """Its blocks are still to come, or its first token, which nobody else tells."""
        return not self._has_landed or self._order.position == self._num_prompt_tokens

    # The generation server's half.

    def _admit(self, link: GenerationLink) -> None:
        request = self._calls.admit(link_id=link.link_id, stream_key=self._stream_key, source=self.placement.context)
        try:
            link.admit(request)
        except ServerLost as error:
            self.on_refused(error)

    def on_refused(self, error: DisaggregatedError) -> None:
        """The generation server did not admit it."""
        generation = self.placement.generation
        assert generation is not None, "nobody was asked to admit it"
        if self._is_over:
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

    def on_delta(self, delta: control_pb2.StreamDelta, now_s: float) -> None:
        if delta.HasField("times"):
            self.story.admitted(delta.times)
            if self.placement.context is None:
                self._learn_speed(self.placement.generation)
        if delta.HasField("error"):
            self._is_over_there = True
            if delta.HasField("times"):
                self._landed()
            self._refused_later(rpc.from_stream_error(delta.error))
            return
        if not self._has_landed:
            self._landed()
        token_ids, finish_reason = delta.token_ids, delta.finish_reason
        if finish_reason:
            self._is_over_there = True
        elif not token_ids:
            return  # Its blocks are there, and it waits for its turn in the batch.
        if delta.HasField("logprobs") or delta.HasField("prompt_logprobs"):
            self._arrived(arrival_of(delta), now_s)
        else:
            self._came(delta.first_position, token_ids, finish_reason, now_s)

    def _open_lane(self, terminal: Terminal) -> Lane | None:
        return None if self._link is None else self._link.open_lane(self._stream_key, terminal)

    def _landed(self) -> None:
        self._has_landed = True
        self._owner.landings.came(self)

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

    def _delivered(self, now_s: float) -> None:
        life = self.run.life
        if life.phase is _PREFILLING:
            self._prefill_is_over(now_s)
        if life.phase is _DECODING:
            self._enter_flow()
            if self._context_share is not None and not self._needs_context:
                self._let_context_go(self._context_share)

    def _prefill_is_over(self, now_s: float) -> None:
        """Its first tokens came."""
        for share in (self._context_share, self._generation_share):
            if share is not None and share.num_prefill_tokens:
                share.left_to_prefill(0)
        if self._generation_share is not None:
            self._generation_share.decodes()
        if self._has_landed:
            self.run.life.advance(Phase.DECODING, now_s=now_s)
        else:
            self.run.life.advance(Phase.TRANSFERRING, now_s=now_s)
            self._owner.landings.expect(self)

    def _let_context_go(self, share: Share) -> None:
        """It has done its part: what it could serve at once is no longer bounded by how long answers are."""
        self._context_share = None
        context = self.placement.context
        assert context is not None, "a share of a server that was not chosen"
        self._give_back(context)
        self._owner.room_came()

    def not_landed(self) -> None:
        """The first token came too long ago."""
        self.culprits.add(self.story.context_instance)
        self._fail(TransferTimeout(f"the KV had not landed {TRANSFER_TIMEOUT_S:g} s after the first token"))

    def _finish(self, now_s: float) -> None:
        self.run.life.advance(Phase.FINISHED, now_s=now_s)
        self.stop()
        self._owner.attempt_over(self, None)

    def _fail(self, error: DisaggregatedError) -> None:
        if not self._is_over:
            self.stop()
            self._owner.attempt_over(self, error)
