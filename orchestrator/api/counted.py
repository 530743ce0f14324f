"""A stream whose every event tells the counts so far (`stream_options.continuous_usage_stats`, as vLLM has it).

It has no part in the fast lane of plain streams, whose events differ in their text only.
"""

from __future__ import annotations

from collections.abc import Sequence

from disaggregated.text import ChoiceText
from disaggregated.token_logprobs import Told
from orchestrator.api.beside import Beside
from orchestrator.api.choices import StreamedChoice
from orchestrator.api.shapes import Shape
from orchestrator.parsers import ReplyParser


class CountedChoice(StreamedChoice):
    """The counts are those of one prompt and of this reply to it, also where there are others beside it."""

    def __init__(
        self,
        index: int,
        shape: Shape,
        text: ChoiceText,
        parser: ReplyParser | None = None,
        beside: Beside | None = None,
        *,
        echoed: str = "",
        num_prompt_tokens: int,
    ) -> None:
        super().__init__(index, shape, text, parser, beside, echoed=echoed)
        self._around = None
        self._num_prompt_tokens = num_prompt_tokens
        self._num_tokens = 0

    def push(self, token_ids: Sequence[int], finish_reason: str, told: Told | None = None) -> bool:
        self._num_tokens += len(token_ids)
        return super().push(token_ids, finish_reason, told)

    def flush(self) -> None:
        self._shape.count(self._num_prompt_tokens, self._num_tokens)
        super().flush()
