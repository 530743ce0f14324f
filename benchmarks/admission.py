"""What admission costs a request: from the headers to the ticket, through the queue, and afterwards.

python -m benchmarks.admission

The real gate and waiting room, one request after another, first with nobody else waiting and then before a crowd.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from disaggregated.request_life import Phase, RequestLife
from disaggregated.sampling_params import SamplingParams
from orchestrator.admission.gate import Gate
from orchestrator.admission.quotas import OwnLevels, Quotas
from orchestrator.admission.ticket import Ticket
from orchestrator.admission.waiting_room import WaitingRoom
from orchestrator.request_run import TokenRequest
from orchestrator.story import AttemptStory, RequestStory

HEADERS: Final = {"host": "127.0.0.1:8000", "content-type": "application/json", "user-agent": "benchmark"}
NUM_CALLS: Final = 10_000
NUM_RUNS: Final = 5
NUM_CROWD: Final = 1000
NUM_TENANTS: Final = 500
TIMEOUT_S: Final = 180.0
PATIENCE_S: Final = 86_400.0
"""Of those who stand in the queue: none is to be too late, however slow the machine is."""


class Door:
    def __init__(self) -> None:
        self._gate = Gate(None, Quotas(OwnLevels(), clock=time.monotonic))
        self._room: WaitingRoom[str] = WaitingRoom(2 * NUM_CROWD, turn_away=lambda item, error: None)
        self._story = _a_story()

    def visit(self) -> Ticket:
        """What is asked of the gate before a request is tokenized."""
        caller = self._gate.let_in("/v1/chat/completions", HEADERS)
        visit = self._gate.visit(caller, HEADERS, user=None, priority=0)
        self._room.check_room(visit.tenant, priority=0, now_s=time.monotonic())
        visit.timeout_s(TIMEOUT_S)
        return visit.ticket()

    def enter(self, request: TokenRequest) -> None:
        self._room.enter("r", request, now_s=time.monotonic(), is_idle=False)

    def pass_by(self, request: TokenRequest) -> None:
        """In, dispatched, over, while nobody waits."""
        assert self._room.may_pass(request, now_s=time.monotonic(), is_idle=False)
        cost = self._room.passed(request, now_s=time.monotonic())
        self._room.over(request, cost, self._story)

    def through(self, request: TokenRequest) -> None:
        """In, first, dispatched, over, with a crowd: it is another one who is first."""
        self.enter(request)
        first = self._room.first(now_s=time.monotonic())
        assert first is not None
        self._room.take(first, now_s=time.monotonic())
        self._room.over(request, first.cost, self._story)


def a_request(ticket: Ticket) -> TokenRequest:
    now_s = time.monotonic()
    return TokenRequest(
        request_id="r",
        token_ids=range(100),
        sampling=SamplingParams(max_tokens=50),
        arrived_s=now_s,
        deadline_s=now_s + PATIENCE_S,
        ticket=ticket,
    )


def _a_story() -> RequestStory:
    life = RequestLife("r", now_s=0.0)
    life.phase = Phase.FINISHED
    story = RequestStory(life=life, arrived_s=0.0, num_prompt_tokens=100)
    story.attempts.append(AttemptStory(context_instance="ctx-0", generation_instance="gen-0"))
    story.tokens_came(1, now_s=0.1)
    story.tokens_came(49, now_s=0.6)
    return story


def microseconds(call: Callable[[], object]) -> float:
    """Of this process's own time, the best of some runs."""
    best_s = float("inf")
    for _ in range(NUM_RUNS):
        begin_s = time.process_time()
        for _ in range(NUM_CALLS):
            call()
        best_s = min(best_s, time.process_time() - begin_s)
    return best_s / NUM_CALLS * 1e6


def main() -> None:
    door = Door()
    request = a_request(door.visit())
    print(f"gate: {microseconds(door.visit):.1f} us")
    print(f"queue, nobody waits: {microseconds(lambda: door.pass_by(request)):.1f} us")
    crowd = [a_request(Ticket(tenant=f"tenant-{number % NUM_TENANTS}")) for number in range(NUM_CROWD)]
    for each in crowd:
        door.enter(each)
    turns = iter(crowd * (NUM_CALLS * NUM_RUNS // NUM_CROWD + 1))
    print(f"queue, {NUM_CROWD} of {NUM_TENANTS} tenants wait: {microseconds(lambda: door.through(next(turns))):.1f} us")


if __name__ == "__main__":
    main()
