"""The answer that nearly everybody wants: one reply, all of it text, told as a whole.

Nothing stands between its tokens and its JSON but the detokenizer, and nothing is built for it but its bytes. What it
says is what `single.py` would have said with a shape and a choice; a test compares them byte for byte.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from disaggregated.errors import DisaggregatedError
from disaggregated.text import Detokenizer
from disaggregated.token_logprobs import Told
from orchestrator.api.answering import Answering
from orchestrator.api.direct import answer
from orchestrator.api.drafts import Draft
from orchestrator.api.shapes import plain_answer
from orchestrator.front_door import FrontDoor
from orchestrator.http.exchange import Exchange
from orchestrator.request_run import TokenRequest
from orchestrator.story import RequestStory

WAITING_MAX: Final = 1024
"""Tokens that are made into text at once: a tenth of a millisecond."""


class PlainAnswer(Answering):
    """Implements `TokenSink`, and is told when it is over; it is over when the exchange is."""

    __slots__ = (
        "_created",
        "_detokenizer",
        "_draft",
        "_reason",
        "_text",
        "_waiting",
    )

    def __init__(self, door: FrontDoor, exchange: Exchange, draft: Draft, request: TokenRequest) -> None:
        super().__init__(door, exchange, request)
        self._draft = draft
        self._created = int(time.time())
        self._detokenizer: Detokenizer | None = None
        self._text = ""
        self._waiting: list[int] = []
        """Tokens that are not text yet."""
        self._reason = ""

    def begin(self) -> None:
        """Raises as `Dispatcher.begin`."""
        self._begin(self)

    def push(self, token_ids: Sequence[int], finish_reason: str, told: Told | None = None) -> bool:
        self._waiting += token_ids
        self._reason = finish_reason
        if len(self._waiting) > WAITING_MAX and not finish_reason:
            self._detokenize(self._waiting)
            self._waiting = []
        return not finish_reason

    def push_token(self, token_id: int) -> bool:
        self._waiting.append(token_id)
        return len(self._waiting) <= WAITING_MAX or self.push((), "")

    def _detokenize(self, token_ids: Sequence[int]) -> Detokenizer:
        detokenizer = self._detokenizer
        if detokenizer is None:
            skips, tokenizer = self._draft.fields.reply.skip_special_tokens, self._draft.model.tokenizer
            detokenizer = tokenizer.detokenizer(self._request.token_ids, skip_special_tokens=skips)
            self._detokenizer = detokenizer
        self._text += detokenizer.push(token_ids)
        return detokenizer

    def _end(self, story: RequestStory, error: DisaggregatedError | None) -> None:
        if error is not None:
            self._exchange.refuse(error)
        else:
            answer(self._exchange, self._body(story), self._draft.headers(), self._door.outbox)

    def _body(self, story: RequestStory) -> bytes:
        draft = self._draft
        return plain_answer(
            is_chat=draft.is_chat,
            request_id=draft.request_id,
            model=draft.model.name,
            created=self._created,
            text=self._whole_text(),
            finish_reason=self._reason,
            counts=story,
        )

    def _whole_text(self) -> str:
        """Without the token that stopped it."""
        detokenizer = self._detokenize(self._waiting[:-1] if self._reason == "stop" else self._waiting)
        return self._text + detokenizer.flush()
