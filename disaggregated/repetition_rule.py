"""When a reply goes round in circles, as data and as the test of it: it travels with a request.

It is vLLM's `repetition_detection`: a pattern of some length that stands several times in a row at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

from disaggregated.errors import InvalidRequest
from disaggregated.v1 import control_pb2

PATTERN_SIZE_MAX: Final = 1024
TOKENS_MAX: Final = 16_384
"""That are looked back on, after each token: the longest pattern, as often as it has to stand there."""


@dataclasses.dataclass(frozen=True, slots=True)
class RepetitionRule:
    pattern_size_min: int
    """In tokens, at least 1."""
    pattern_size_max: int
    count_min: int
    """How often it has to stand there, at least 2."""

    @property
    def num_tokens(self) -> int:
        """What comes before these makes no difference."""
        return self.pattern_size_max * self.count_min

    def is_met_by(self, token_ids: Sequence[int]) -> bool:
        """Whether they end in a pattern that often. A run that equals itself moved by a pattern is made of it."""
        num_tokens = len(token_ids)
        size_max = min(self.pattern_size_max, num_tokens // self.count_min)
        for size in range(self.pattern_size_min, size_max + 1):
            begin = num_tokens - size * self.count_min
            if token_ids[-1] == token_ids[-1 - size] and token_ids[begin:-size] == token_ids[begin + size :]:
                return True
        return False

    def to_proto(self) -> control_pb2.RepetitionRule:
        return control_pb2.RepetitionRule(
            pattern_size_min=self.pattern_size_min, pattern_size_max=self.pattern_size_max, count_min=self.count_min
        )

    @classmethod
    def from_proto(cls, message: control_pb2.RepetitionRule) -> RepetitionRule:
        """Raises InvalidRequest for what no orchestrator of ours sends."""
        rule = cls(message.pattern_size_min, message.pattern_size_max, message.count_min)
        if not (1 <= rule.pattern_size_min <= rule.pattern_size_max <= PATTERN_SIZE_MAX and rule.count_min >= 2):
            raise InvalidRequest(f"repetition: {rule} is no rule", param="repetition")
        if rule.num_tokens > TOKENS_MAX:
            raise InvalidRequest(
                f"repetition: looks back on {rule.num_tokens} tokens, the limit is {TOKENS_MAX}", param="repetition"
            )
        return rule
