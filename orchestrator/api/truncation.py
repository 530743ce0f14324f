"""Prompts that are cut to a length: the client's own, or what the model leaves for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

from disaggregated.errors import InvalidRequest
from orchestrator.api.fields import Fields, shown
from orchestrator.api.sampling_fields import TOKENS_MAX

TO_THE_MODEL: Final = -1
SIDES: Final = ("left", "right")


@dataclasses.dataclass(frozen=True, slots=True)
class Truncation:
    num_tokens: int
    """Of a prompt at most; -1: as many as fit beside the reply."""
    keeps_beginning: bool

    def of(self, prompt: Sequence[int], *, num_tokens_max: int, max_tokens: int) -> Sequence[int]:
        """`num_tokens_max`: the longest sequence, prompt and reply together."""
        limit = self.num_tokens
        if limit == TO_THE_MODEL:
            limit = num_tokens_max - (max_tokens if max_tokens < num_tokens_max else 1)
        return prompt[:limit] if self.keeps_beginning else prompt[-limit:]


def read_truncation(fields: Fields) -> Truncation | None:
    """
    Raises:
        InvalidRequest: names the field and its limit.
    """
    side = fields.text("truncation_side") or "left"
    if side not in SIDES:
        raise InvalidRequest(f"truncation_side must be left or right, is {shown(side)}", param="truncation_side")
    num_tokens = fields.integer("truncate_prompt_tokens", low=TO_THE_MODEL, high=TOKENS_MAX)
    if num_tokens == 0:
        raise InvalidRequest(
            "truncate_prompt_tokens must be at least 1, or -1 for what the model leaves; is 0",
            param="truncate_prompt_tokens",
        )
    return None if num_tokens is None else Truncation(num_tokens, side == "right")
