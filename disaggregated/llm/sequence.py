"""One sequence of one prompt while it is generated: the engine's events in, text out."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from disaggregated.engine.api import ChunkComputed, EngineEvent, EngineRequest, RequestFailed, TokensSampled
from disaggregated.llm.outputs import CompletionOutput, Logprob, Logprobs, RequestOutput
from disaggregated.text import ChoiceText, Tokenizer
from disaggregated.token_logprobs import TokenLogprob


class Sequence:
    """Writes into `output`, one of `request_output.outputs`; used by the one thread that waits for it."""

    def __init__(
        self,
        request: EngineRequest,
        request_output: RequestOutput,
        output: CompletionOutput,
        text: ChoiceText,
        tokenizer: Tokenizer,
    ) -> None:
        self.request = request
        self.request_output = request_output
        self.output = output
        self._text = text
        self._tokenizer = tokenizer
        if request.sampling.logprobs is not None:
            output.logprobs, output.cumulative_logprob = [], 0.0

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
                if self.request.sampling.prompt_logprobs is not None and self.request_output.prompt_logprobs is None:
                    self._take_prompt(event.prompt_logprobs)
                self._take_tokens(event.token_ids, str(event.finish_reason or ""), event.logprobs)

    def _take_prompt(self, told: SequenceOf[TokenLogprob]) -> None:
        """Each of a prompt's sequences is told the same; the first that hears of it is enough."""
        pairs = zip(self.request_output.prompt_token_ids[1:], told, strict=True)
        self.request_output.prompt_logprobs = [None, *(self._by_id(token_id, one) for token_id, one in pairs)]

    def _take_logprob(self, token_id: int, told: TokenLogprob) -> None:
        assert self.output.logprobs is not None, "told unasked"
        assert self.output.cumulative_logprob is not None, "told unasked"
        is_ranked = not self.request.sampling.logprob_token_ids
        self.output.logprobs.append(self._by_id(token_id, told, is_ranked=is_ranked))
        self.output.cumulative_logprob += told.logprob

    def _by_id(self, token_id: int, told: TokenLogprob, *, is_ranked: bool = True) -> Logprobs:
        beside = enumerate(zip(told.top_token_ids, told.top_logprobs, strict=True), start=1)
        found = {
            other: Logprob(logprob, rank if is_ranked else None, self._spelled(other))
            for rank, (other, logprob) in beside
        }
        return {**found, token_id: Logprob(told.logprob, told.rank, self._spelled(token_id))}

    def _spelled(self, token_id: int) -> str:
        return self._tokenizer.spelled(token_id).decode(errors="replace")

    def _take_tokens(self, token_ids: SequenceOf[int], finish_reason: str, logprobs: SequenceOf[TokenLogprob]) -> None:
        """Token by token, so that a stop string cuts the same ones off however many a step brought."""
        for index, token_id in enumerate(token_ids):
            is_last = index == len(token_ids) - 1
            self.output.token_ids.append(token_id)
            if logprobs:
                self._take_logprob(token_id, logprobs[index])
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
        return None if last in self._tokenizer.eos_token_ids else last
