"""What it costs a server to compute a part of a prompt, learnt from steps that it computed. Pure: no clock, no I/O.

A step takes `fixed + per_token * tokens + per_pair * pairs`, where a token makes a pair with each token before it in
its sequence: linears cost by the token, attention by the pair. The three are fitted to the steps by least squares of
the relative error, so that a step that was held up for a second weighs next to nothing; older ones weigh less and
less. None is ever negative: projected Gauss-Seidel over the normal equations, which needs no inverse, and so does not
mind steps that are all alike.
"""

from __future__ import annotations

import dataclasses
from typing import Final

FORGETTING: Final = 0.99
"""The weight that a step keeps when another one comes: the last hundred count."""
SWEEPS: Final = 30
_UNITS: Final = (1.0, 256.0, 256.0 * 1024.0)
"""A step, tokens and pairs are counted in these, so that the three coefficients are of one size."""


@dataclasses.dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds."""

    fixed_s: float
    token_s: float
    pair_s: float

    def step_s(self, num_tokens: int, num_pairs: int) -> float:
        return self.fixed_s + self.token_s * num_tokens + self.pair_s * num_pairs

    def part_s(self, begin: int, end: int, *, num_tokens: int, chunk_size: int) -> float:
        """What a prompt of `num_tokens` tokens, computed in chunks, saves when tokens `begin` to `end` are there.

        The ones before `begin` are there anyway.
        """
        steps = -(-(num_tokens - begin) // chunk_size) - -(-(num_tokens - end) // chunk_size)
        return self.fixed_s * steps + self.token_s * (end - begin) + self.pair_s * num_pairs(begin, end)


_PEAK_FLOPS: Final = {"cpu": 5e11, "cuda": 1e15}
"""Of one thread, and of one device: more than nearly all have, and more than any engine gets out of them."""


def prior(num_parameters: int, *, device: str, num_threads: int) -> StepCost:
    """What a token cannot cost less than: two operations a parameter, at the peak of the machine.

    It stands in until a step was measured. So computing is believed to be quicker than it is, and nobody waits for a
    transfer that a guess spoke for. Of a mixture of experts all are counted, until it is measured.
    """
    kind = device.partition(":")[0]
    flops = _PEAK_FLOPS[kind] * (num_threads if kind == "cpu" else 1)
    return StepCost(fixed_s=0.0, token_s=2 * num_parameters / flops, pair_s=0.0)


def num_pairs(begin: int, end: int) -> int:
    """Of tokens `begin` to `end` of a sequence with those before each."""
    return (end * (end - 1) - begin * (begin - 1)) // 2


@dataclasses.dataclass(frozen=True, slots=True)
class MeasuredStep:
    num_tokens: int
    num_pairs: int
    seconds: float


class ComputeCost:
    """The fit. Constant time and memory a step."""

    def __init__(self, guess: StepCost) -> None:
        self._theta = [guess.fixed_s * _UNITS[0], guess.token_s * _UNITS[1], guess.pair_s * _UNITS[2]]
        self._matrix = [[0.0] * 3 for _ in range(3)]
        self._vector = [0.0] * 3
        self._is_fitted = True
        self.num_steps = 0

    def observe(self, step: MeasuredStep) -> None:
        if step.num_tokens < 1 or step.seconds <= 0.0:
            return
        self.num_steps += 1
        self._add(step.num_tokens, step.num_pairs, step.seconds)
        self._is_fitted = False

    def fit(self) -> StepCost:
        if not self._is_fitted:
            self._solve()
        return StepCost(*(value / unit for value, unit in zip(self._theta, _UNITS, strict=True)))

    def _add(self, num_tokens: int, pairs: int, seconds: float) -> None:
        """One more row of `x theta = 1`, where x is the step's size divided by its seconds."""
        x = [size / unit / seconds for size, unit in zip((1, num_tokens, pairs), _UNITS, strict=True)]
        for i in range(3):
            self._vector[i] = FORGETTING * self._vector[i] + x[i]
            for j in range(3):
                self._matrix[i][j] = FORGETTING * self._matrix[i][j] + x[i] * x[j]

    def _solve(self) -> None:
        """From the last fit on: what the steps say nothing about stays as it was."""
        matrix, theta = self._matrix, self._theta
        for _ in range(SWEEPS):
            for i in (1, 2, 0):  # One step alone says most about what a token costs.
                if matrix[i][i] > 0.0:
                    rest = sum(matrix[i][j] * theta[j] for j in range(3) if j != i)
                    theta[i] = max(0.0, (self._vector[i] - rest) / matrix[i][i])
        self._is_fitted = True
