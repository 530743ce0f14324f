"""How long a reply may reason, as data: it travels with a request, and every server that continues it reads it."""

from __future__ import annotations

import dataclasses
from typing import Final

from disaggregated.errors import InvalidRequest
from disaggregated.v1 import control_pb2

TAG_TOKENS_MAX: Final = 64


@dataclasses.dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """A reply reasons once, at its beginning, between two tags; after `num_tokens` the second one follows."""

    num_tokens: int
    """0: the reply does not reason."""
    begin: tuple[int, ...]
    """The tag that begins it; empty: it begins in the prompt or not at all."""
    end: tuple[int, ...]
    """The tag that ends it, at least one token."""
    is_open: bool
    """The client's prompt ends within reasoning."""

    def to_proto(self) -> control_pb2.ThinkingBudget:
        return control_pb2.ThinkingBudget(
            num_tokens=self.num_tokens, begin=self.begin, end=self.end, is_open=self.is_open
        )

    @classmethod
    def from_proto(cls, message: control_pb2.ThinkingBudget) -> ThinkingBudget:
        """Raises InvalidRequest for what no orchestrator of ours sends."""
        if not message.end:
            raise InvalidRequest("thinking: no tag ends it", param="thinking")
        for tag in (message.begin, message.end):
            if len(tag) > TAG_TOKENS_MAX:
                raise InvalidRequest(
                    f"thinking: a tag of {len(tag)} tokens, the limit is {TAG_TOKENS_MAX}", param="thinking"
                )
        return cls(message.num_tokens, tuple(message.begin), tuple(message.end), message.is_open)
