"""How fast a server is, as its heartbeats and the prompts that it computed tell. Pure: time comes in as an argument.

    a prompt costs          what the server has measured of its own steps, or else what its prompts took
    a decode step takes     seconds between heartbeats over steps between them
    a link carries          what the generation server has measured of the last transfers

Until something was measured there are guesses, the same for all servers, so that loads alone decide.
"""

from __future__ import annotations

from typing import Final

from disaggregated.compute_cost import ComputeCost, MeasuredStep, StepCost, num_pairs
from disaggregated.v1 import control_pb2

TOKEN_S: Final = 1e-4
"""Guess: ten thousand tokens of prompts a second."""
LINK_BYTES_PER_S: Final = 1e9
"""Guess."""
ROW_S: Final = 1e-4
"""Guess: of a decode step, for each of its rows and of its eight that every step costs."""
ROWS_OF_EVERY_STEP: Final = 8
"""A decode step without rows would take as long as this many rows do: weights are read however few there are."""
RECENT: Final = 0.25
"""Weight of the last interval."""


class ServerSpeed:
    """One connection's measurements. Constant time and memory."""

    def __init__(self) -> None:
        self._prompts = ComputeCost(StepCost(fixed_s=0.0, token_s=TOKEN_S, pair_s=0.0))
        self._row_s = ROW_S
        self._last: tuple[float, control_pb2.Heartbeat] | None = None
        self._link_bytes_per_s: dict[str, float] = {}
        self.prompt = self._prompts.fit()
        """What computing a step costs. The pairs of a token are those with each token before it in its sequence."""

    def heard(self, heartbeat: control_pb2.Heartbeat, *, now_s: float) -> None:
        if self._last is not None:
            self._learn_rows(*self._last, heartbeat, now_s)
        self._last = (now_s, heartbeat)
        self._link_bytes_per_s = {
            link.peer_id: link.recent_bytes_per_s for link in heartbeat.links if link.recent_bytes_per_s > 0.0
        }
        if heartbeat.has_step_cost:
            self.prompt = StepCost(heartbeat.step_fixed_s, heartbeat.step_token_s, heartbeat.step_pair_s)
        else:
            self.prompt = self._prompts.fit()

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
        pairs = num_pairs(num_cached, num_tokens)
        self._prompts.observe(MeasuredStep(num_tokens - num_cached, pairs, seconds))

    def decode_step_s(self, num_rows: float) -> float:
        return self._row_s * (ROWS_OF_EVERY_STEP + num_rows)

    def link_bytes_per_s(self, source_id: str) -> float:
        """From that instance to this server."""
        return self._link_bytes_per_s.get(source_id, LINK_BYTES_PER_S)
