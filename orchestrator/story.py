"""What happened to one request, with times: made while it runs, read by `GET /requests/{id}`, metrics and the log.

The time to first token is told as parts that add up to it:

    ttft = prepare + queue + lost attempts + prefix reuse + prefill queue + prefill compute + hand-off

`prepare` is checking, rendering and tokenizing; `prefix reuse` is what the context server spent on a hint who holds the
prompt's beginning: deciding, and bringing it if it was worth it; `hand-off` is what neither server saw: calls, sockets
and event loops.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import msgspec

from disaggregated.request_life import Phase, RequestLife
from disaggregated.v1 import control_pb2
from orchestrator.admission.ticket import Objectives
from orchestrator.routing.decision import NOTHING_WEIGHED, Decision


class AttemptStory(msgspec.Struct, kw_only=True):
    """One dispatch. Times are seconds; `_s` fields that stayed 0 were not reached, or did not apply."""

    context_instance: str
    """Empty: prefilled where it decodes."""
    generation_instance: str
    """Empty: one token was wanted."""
    decision: Decision = NOTHING_WEIGHED
    """Why these servers, and which others there were."""
    began_s: float = 0.0
    ended_s: float | None = None
    first_token_s: float | None = None
    result: str = "cancelled"
    """The finish reason, or the error that ended it; what it says until then is so if nothing else ends it."""
    num_tokens: int = 0
    num_cached_tokens: int = 0
    prefill_queue_s: float = 0.0
    prefill_compute_s: float = 0.0
    transfer_s: float = 0.0
    exposed_s: float = 0.0
    first_decode_step_s: float = 0.0
    transfer_bytes: int = 0
    num_publications: int = 0
    """In which the prompt's KV was offered while it was computed."""
    hidden_bytes: int = 0
    """Of `transfer_bytes`, that had landed before the prefill was over."""
    saved_bytes: int = 0
    """Of the prompt's KV, that did not travel: the generation server had it."""
    transport: str = ""
    reuse_from: str = ""
    """The instance that was known to hold more of the prompt than the context server; empty: there was none."""
    reuse_verdict: str = ""
    reuse_s: float = 0.0
    num_pulled_tokens: int = 0
    pulled_bytes: int = 0
    num_considered_tokens: int = 0
    pull_estimate_s: float = 0.0
    """Of the considered tokens, as the cost model saw it beforehand."""
    compute_estimate_s: float = 0.0

    @property
    def why(self) -> str:
        return self.decision.why

    def prefilled(self, outcome: control_pb2.PrefillOutcome, *, reuse_from: str) -> None:
        """reuse_from: whom the context server was told of; empty: nobody."""
        self.prefill_queue_s, self.prefill_compute_s = outcome.queue_s, outcome.compute_s
        if not reuse_from:
            return
        self.reuse_from, reuse = reuse_from, outcome.reuse
        self.reuse_verdict, self.reuse_s = reuse.verdict, reuse.spent_s
        self.num_pulled_tokens, self.pulled_bytes = reuse.num_tokens, reuse.num_bytes
        self.num_considered_tokens = reuse.num_considered_tokens
        self.pull_estimate_s, self.compute_estimate_s = reuse.pull_estimate_s, reuse.compute_estimate_s

    def admitted(self, times: control_pb2.AdmissionTimes) -> None:
        if not self.context_instance:
            self.prefill_queue_s, self.prefill_compute_s = times.queue_s, times.compute_s
            self.num_cached_tokens = times.num_cached_tokens
        self.transfer_s, self.exposed_s = times.transfer_s, times.exposed_s
        self.first_decode_step_s = times.landed_to_step_s
        self.transfer_bytes, self.transport = times.transfer_bytes, times.transport
        self.num_publications, self.hidden_bytes = times.num_publications, times.hidden_bytes
        self.saved_bytes = times.saved_bytes


class RequestStory(msgspec.Struct, kw_only=True):
    life: RequestLife
    arrived_s: float
    num_prompt_tokens: int
    tenant: str = ""
    objectives: Objectives = Objectives()
    num_tokens: int = 0
    attempts: list[AttemptStory] = msgspec.field(default_factory=list)
    first_token_s: float | None = None
    last_token_s: float = 0.0
    """0 before the first one."""
    longest_gap_s: float = 0.0
    finish_reason: str = ""
    error: str = ""

    @property
    def request_id(self) -> str:
        return self.life.request_id

    @property
    def num_cached_tokens(self) -> int:
        """Of the prompt, not computed again by whoever prefilled it first."""
        for attempt in self.attempts:
            if attempt.first_token_s is not None:
                return min(attempt.num_cached_tokens, self.num_prompt_tokens)
        return 0

    def tokens_came(self, count: int, *, now_s: float) -> None:
        if self.first_token_s is None:
            self.first_token_s = now_s
        else:
            self.longest_gap_s = max(self.longest_gap_s, now_s - self.last_token_s)
        self.last_token_s = now_s
        self.num_tokens += count
        attempt = self.attempts[-1]
        attempt.num_tokens += count
        if attempt.first_token_s is None:
            attempt.first_token_s = now_s

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        if self.first_token_s is None or self.num_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.num_tokens - 1)

    def queue_s(self, *, until_s: float) -> float:
        """Time in the queue before `until_s`."""
        queued_s, since_s = 0.0, None
        for began_s, phase in self.life.story:
            if since_s is not None:
                queued_s += max(0.0, min(began_s, until_s) - since_s)
            since_s = began_s if phase is Phase.QUEUED else None
        return queued_s if since_s is None else queued_s + max(0.0, until_s - since_s)

    def ttft_parts(self) -> dict[str, float]:
        """Adds up to `ttft_s`; empty before the first token."""
        if self.first_token_s is None:
            return {}
        winner = next(attempt for attempt in self.attempts if attempt.first_token_s is not None)
        earlier = self.attempts[: self.attempts.index(winner)]
        served = winner.reuse_s + winner.prefill_queue_s + winner.prefill_compute_s
        return {
            "prepare_s": self.life.story[0][0] - self.arrived_s,
            "queue_s": self.queue_s(until_s=self.first_token_s),
            "lost_attempts_s": sum((attempt.ended_s or 0.0) - attempt.began_s for attempt in earlier),
            "prefix_reuse_s": winner.reuse_s,
            "prefill_queue_s": winner.prefill_queue_s,
            "prefill_compute_s": winner.prefill_compute_s,
            "hand_off_s": self.first_token_s - winner.began_s - served,
        }

    def as_json(self, *, now_s: float) -> dict[str, Any]:
        """Times are relative to the request's arrival."""
        return {
            "request_id": self.request_id,
            "outcome": str(self.life.phase),
            "finish_reason": self.finish_reason or None,
            "error": self.error or None,
            "tenant": self.tenant or None,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_cached_tokens": self.num_cached_tokens,
            "num_tokens": self.num_tokens,
            "e2e_s": (self.life.story[-1][0] if self.life.is_over else now_s) - self.arrived_s,
            "ttft_s": self.ttft_s,
            "ttft_parts": self.ttft_parts(),
            "tpot_s": self.tpot_s,
            "longest_gap_s": self.longest_gap_s,
            "phases": {
                str(phase): self.life.seconds_in(phase, now_s=now_s)
                for phase in dict.fromkeys(phase for _, phase in self.life.story)
                if phase not in (Phase.FINISHED, Phase.FAILED, Phase.CANCELLED)
            },
            "story": [[began_s - self.arrived_s, str(phase)] for began_s, phase in self.life.story],
            "attempts": [self._attempt_as_json(attempt) for attempt in self.attempts],
        }

    def _attempt_as_json(self, attempt: AttemptStory) -> dict[str, Any]:
        decision = attempt.decision.as_json()
        fields = {**msgspec.structs.asdict(attempt), "why": attempt.why, "decision": decision}
        for name in ("began_s", "ended_s", "first_token_s"):
            if fields[name] is not None:
                fields[name] -= self.arrived_s
        return fields


class StoryShelf:
    """Stories of requests that run, and of the last `kept_max` that ended. When full, the oldest is forgotten."""

    def __init__(self, kept_max: int) -> None:
        self._kept_max = kept_max
        self.num_running = 0
        """Counted, because clients may give one id to two requests at a time."""
        self._running: dict[str, RequestStory] = {}
        self._ended: OrderedDict[str, RequestStory] = OrderedDict()

    def began(self, story: RequestStory) -> None:
        self.num_running += 1
        self._running[story.request_id] = story

    def ended(self, story: RequestStory) -> None:
        self.num_running -= 1
        if self._running.get(story.request_id) is story:
            del self._running[story.request_id]
        self._ended[story.request_id] = story
        self._ended.move_to_end(story.request_id)
        while len(self._ended) > self._kept_max:
            self._ended.popitem(last=False)

    def find(self, request_id: str) -> RequestStory | None:
        """The story of a request; when a client used an id twice, of the one that runs, else of the later one."""
        return self._running.get(request_id) or self._ended.get(request_id)
