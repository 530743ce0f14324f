"""How fast a server is, as its heartbeats and the prompts that it computed tell. Pure: time comes in as an argument.

    a prompt costs          what the server has measured of its own steps, or else what its prompts took
    a decode step takes     seconds between heartbeats over steps between them
    a link carries          what the generation server has measured of the last transfers

Until something was measured there are guesses, the same for all servers, so that loads alone decide.

What one server measured is believed as far as it has computed enough of late; the rest is what its pool measured. A
first step that had to read weights from disk would else stand for ever: the server looks slow, gets nothing, and never
measures again. So a server that is idle comes back to the average of its pool, and is tried (the estimate by shrinkage
of James and Stein, Estimation with Quadratic Loss, 1961, with evidence that ages).
"""

from __future__ import annotations

from typing import Final

from disaggregated.compute_cost import ComputeCost, MeasuredStep, StepCost, num_pairs
from disaggregated.v1 import control_pb2

TOKEN_S: Final = 1e-4
"""Guess: ten thousand tokens of prompts a second."""
LINK_BYTES_PER_S: Final = 1e9
"""Guess, of a link that has carried nothing yet."""
ROW_S: Final = 1e-4
"""Guess: of a decode step, for each of its rows and of its eight that every step costs."""
ROWS_OF_EVERY_STEP: Final = 8
"""A decode step without rows would take as long as this many rows do: weights are read however few there are."""
RECENT: Final = 0.25
"""Weight of the last interval."""
STEPS_BELIEVED: Final = 10.0
"""Steps of evidence with which a server's own figures weigh as much as those of its pool."""
STEPS_MAX: Final = 100.0
"""Steps of evidence; the fit itself remembers no more."""
STEPS_HALVE_S: Final = 30.0
"""In so many idle seconds half of the evidence is forgotten."""
POOL_STEPS: Final = 50.0
"""Steps that the average of a pool remembers."""


class PoolSpeed:
    """What computing a step costs on the servers of one pool, on average; they run one model. Constant time and memory.

    The average is over what was computed last, whoever did it, so that servers that left are forgotten.
    """

    def __init__(self) -> None:
        self._average: StepCost | None = None
        self._num_steps = 0.0

    def measured(self, own: StepCost, num_steps: float) -> None:
        """A server computed `num_steps` more, and this is what it makes of all of its steps."""
        self._average = _between(self._average or own, own, num_steps / (num_steps + self._num_steps))
        self._num_steps = min(POOL_STEPS, self._num_steps + num_steps)

    def believed(self, own: StepCost, num_steps: float) -> StepCost:
        """Of a server with `num_steps` steps of evidence."""
        return _between(self._average or own, own, num_steps / (num_steps + STEPS_BELIEVED))


def _between(one: StepCost, other: StepCost, share: float) -> StepCost:
    """share: of the way from one to the other."""
    return StepCost(
        one.fixed_s + share * (other.fixed_s - one.fixed_s),
        one.token_s + share * (other.token_s - one.token_s),
        one.pair_s + share * (other.pair_s - one.pair_s),
    )


class ServerSpeed:
    """One connection's measurements. Constant time and memory."""

    def __init__(self, pool: PoolSpeed | None = None) -> None:
        """pool: shared by all servers of a pool; left out, this one is compared with nobody."""
        self._pool = pool or PoolSpeed()
        self._prompts = ComputeCost(StepCost(fixed_s=0.0, token_s=TOKEN_S, pair_s=0.0))
        self._num_prompts_counted = 0
        self._measures_itself = False
        self._evidence = 0.0
        """In steps, less what was forgotten."""
        self._row_s = ROW_S
        self._last: tuple[float, control_pb2.Heartbeat] | None = None
        self.link_rates: dict[str, float] = {}
        """Bytes a second from an instance to this server, where something was measured."""
        self.prompt = self._prompts.fit()
        """What computing a step costs. The pairs of a token are those with each token before it in its sequence."""

    def heard(self, heartbeat: control_pb2.Heartbeat, *, now_s: float) -> None:
        last, self._last = self._last, (now_s, heartbeat)
        if last is not None:
            self._learn_rows(*last, heartbeat, now_s)
        self.link_rates = {
            link.peer_id: link.recent_bytes_per_s for link in heartbeat.links if link.recent_bytes_per_s > 0.0
        }
        self._measures_itself = heartbeat.has_step_cost
        if heartbeat.has_step_cost:
            own = StepCost(heartbeat.step_fixed_s, heartbeat.step_token_s, heartbeat.step_pair_s)
            num_new = heartbeat.step - (last[1].step if last is not None else 0)
        else:
            own = self._prompts.fit()
            num_new = self._prompts.num_steps - self._num_prompts_counted
            self._num_prompts_counted = self._prompts.num_steps
        self._learn_prompts(own, max(0, num_new), now_s - last[0] if last is not None else 0.0)

    def _learn_prompts(self, own: StepCost, num_new: int, seconds: float) -> None:
        self._evidence = min(STEPS_MAX, self._evidence * 0.5 ** (seconds / STEPS_HALVE_S) + num_new)
        if num_new:
            self._pool.measured(own, min(STEPS_MAX, num_new))
        self.prompt = self._pool.believed(own, self._evidence)

    def _learn_rows(self, then_s: float, then: control_pb2.Heartbeat, now: control_pb2.Heartbeat, now_s: float) -> None:
        """Only of an interval in which it always had something to decode, as far as both ends tell."""
        num_steps = now.step - then.step
        num_tokens = now.generation_tokens_total - then.generation_tokens_total
        if num_steps <= 0 or num_tokens <= 0 or not (then.num_running and now.num_running):
            return
        row_s = (now_s - then_s) / num_steps / (ROWS_OF_EVERY_STEP + num_tokens / num_steps)
        self._row_s = row_s if self._row_s == ROW_S else self._row_s + RECENT * (row_s - self._row_s)

    def prompt_took(self, *, num_tokens: int, num_cached: int, seconds: float) -> None:
        """A prompt was computed there, all but what was cached; queueing does not count."""
        if self._measures_itself:
            return
        pairs = num_pairs(num_cached, num_tokens)
        self._prompts.observe(MeasuredStep(num_tokens - num_cached, pairs, seconds))

    def decode_step_s(self, num_rows: float) -> float:
        return self._row_s * (ROWS_OF_EVERY_STEP + num_rows)
