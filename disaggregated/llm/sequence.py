"""One sequence of one prompt while it is generated: the engine's events in, text out."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from disaggregated.engine.api import ChunkComputed, EngineEvent, EngineRequest, RequestFailed, TokensSampled
from disaggregated.llm.outputs import CompletionOutput, RequestOutput
from disaggregated.text import ChoiceText


class Sequence:
    """Writes into `output`, one of `request_output.outputs`; used by the one thread that waits for it."""

    def __init__(
        self,
        request: EngineRequest,
        request_output: RequestOutput,
        output: CompletionOutput,
        text: ChoiceText,
        *,
        eos_token_ids: SequenceOf[int],
    ) -> None:
        self.request = request
        self.request_output = request_output
        self.output = output
        self._text = text
        self._eos_token_ids = eos_token_ids

    @property
    def is_over(self) -> bool:
        return self.output.finish_reason is not None

    def take(self, event: EngineEvent) -> None:
        """
        Raises:
            DisaggregatedError: what the sequence failed with.
        """
        match event:
            case RequestFailed():
                raise event.error
            case ChunkComputed() if self.output.index == 0:
                self.request_output.num_cached_tokens = event.num_cached_tokens
            case TokensSampled():
                self._take_tokens(event.token_ids, str(event.finish_reason or ""))

    def _take_tokens(self, token_ids: SequenceOf[int], finish_reason: str) -> None:
        """Token by token, so that a stop string cuts the same ones off however many a step brought."""
        for index, token_id in enumerate(token_ids):
            is_last = index == len(token_ids) - 1
            self.output.token_ids.append(token_id)
            self.output.text += self._text.push([token_id], finish_reason if is_last else "")
            if self._text.finish_reason:
                break
        if not token_ids and finish_reason:
            self.output.text += self._text.push((), finish_reason)
        if self._text.finish_reason:
            self.output.finish_reason = self._text.finish_reason
            self.output.stop_reason = self._stop_reason()

    def _stop_reason(self) -> str | int | None:
        if self._text.matched is not None or self.output.finish_reason != "stop":
            return self._text.matched
        last = self.output.token_ids[-1]
        return None if last in self._eos_token_ids else last
