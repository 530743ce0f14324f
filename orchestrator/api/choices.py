"""Where the tokens of one sequence end up in an answer that is collected; and what text becomes on its way there.

token ids ──ChoiceText──▶ text ──ReplyParser──▶ deltas ──Shape──▶ JSON

Without a parser, all text is content, and nothing is built for it but the text itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from disaggregated.text import ChoiceText
from disaggregated.token_logprobs import Told
from orchestrator.api.beside import Beside
from orchestrator.api.shapes import Reply
from orchestrator.parsers import CallStart, Content, Delta, Reasoning, ReplyParser, joined
from orchestrator.request_run import TokenSink

KEPT_MAX: Final = 64
"""Bits of text kept apart before they are joined: a slow client costs a few bytes a token, and a long answer is not
copied once a token."""


class ParsedText:
    """The text of one sequence after its parser."""

    def __init__(self, text: ChoiceText, parser: ReplyParser | None, echoed: str = "") -> None:
        """`echoed`: what the reply begins with, before anything that was generated."""
        self._text = text
        self._parser = parser
        self._has_called = False
        self._kept_text: list[str] = [echoed] if echoed else []
        """Without a parser; joined when it is taken."""
        self._kept: list[Delta] = [Content(echoed)] if echoed else []
        """With one."""
        self._is_reasoning = False
        self.num_reasoning_tokens = 0
        """Those whose text went on with reasoning, or is held back where it did."""
        self.finish_reason = ""

    def push(self, token_ids: Sequence[int], finish_reason: str) -> bool:
        """Whether more is wanted."""
        text = self._text.push(token_ids, finish_reason)
        reason = self._text.finish_reason
        if self._parser is None:
            self._keep_text(text)
        else:
            self._parse(self._parser, text, is_last=bool(reason))
            self.num_reasoning_tokens += len(token_ids) if self._is_reasoning else 0
            if self._parser.has_enough:
                reason = "stop"
        self.finish_reason = "tool_calls" if self._has_called and reason == "stop" else reason
        return not reason

    def _keep_text(self, text: str) -> None:
        if text:
            self._kept_text.append(text)
        if len(self._kept_text) > KEPT_MAX:
            self._kept_text = ["".join(self._kept_text)]

    def _parse(self, parser: ReplyParser, text: str, *, is_last: bool) -> None:
        deltas = parser.push(text) if text else []
        if is_last:
            deltas += parser.finish()
        self._has_called = self._has_called or any(type(delta) is CallStart for delta in deltas)
        if deltas:
            self._is_reasoning = type(deltas[-1]) is Reasoning
        self._kept += deltas
        if len(self._kept) > KEPT_MAX:
            self._kept = joined(self._kept)

    def take_text(self) -> str | None:
        """All the text since it was last taken; None where a parser makes deltas of it."""
        if self._parser is not None:
            return None
        text = self._kept_text[0] if len(self._kept_text) == 1 else "".join(self._kept_text)
        self._kept_text.clear()
        return text

    def take_deltas(self) -> list[Delta]:
        """All deltas since they were last taken, joined."""
        if self._parser is None:
            text = self.take_text()
            return [Content(text)] if text else []
        kept, self._kept = self._kept, []
        return joined(kept) if len(kept) > 1 else kept


class CollectedChoice:
    """One choice of an answer that is not streamed."""

    def __init__(
        self, text: ChoiceText, parser: ReplyParser | None = None, beside: Beside | None = None, *, echoed: str = ""
    ) -> None:
        self._text = ParsedText(text, parser, echoed)
        self._beside = beside
        self._is_plain = parser is None and beside is None and not text.may_stop
        self._waiting: list[int] = []
        """Tokens that are not text yet: nothing can end the reply there, so they are made into text together."""

    def push(self, token_ids: Sequence[int], finish_reason: str, told: Told | None = None) -> bool:
        if self._beside is not None:
            self._beside.push(token_ids, told)
        if not self._is_plain:
            return self._text.push(token_ids, finish_reason)
        self._waiting.extend(token_ids)
        if not finish_reason and len(self._waiting) < KEPT_MAX:
            return True
        waiting, self._waiting = self._waiting, []
        return self._text.push(waiting, finish_reason)

    def push_token(self, token_id: int) -> bool:
        if not self._is_plain or len(self._waiting) >= KEPT_MAX:
            return self.push((token_id,), "")
        self._waiting.append(token_id)
        return True

    def reply(self) -> Reply:
        """Called once, at the end."""
        beside = None if self._beside is None else self._beside.take()
        return Reply(self._text.take_deltas(), self._text.finish_reason, beside)

    @property
    def num_reasoning_tokens(self) -> int:
        return self._text.num_reasoning_tokens

    @property
    def is_large(self) -> bool:
        """Its reply is better made on a thread."""
        return self._beside is not None and self._beside.is_large

    @property
    def mean_logprob(self) -> float:
        return 0.0 if self._beside is None else self._beside.mean_logprob


class PromptOnly:
    """Implements `TokenSink` for who wants to hear of the prompt alone: the token that comes with it is not shown."""

    def __init__(self, sink: TokenSink) -> None:
        self._sink = sink

    def push(self, token_ids: Sequence[int], finish_reason: str, told: Told | None = None) -> bool:
        return self._sink.push((), "length", told and Told((), told.prompt))
