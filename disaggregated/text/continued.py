"""A chat whose last message is not over: the prompt ends where that message does, and the reply goes on from there.

As transformers' `continue_final_message` does it: the message's text is marked, the template is run, and what it writes
is cut at the mark. So whatever a template puts behind a message is left out, also by templates that nobody here knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from disaggregated.errors import InvalidRequest

FIELD: Final = "continue_final_message"
_MARK: Final = "THE_MESSAGE_GOES_ON_HERE"
_AFTER: Final = " "
"""Behind the mark. Where a template takes it away, it takes away the space at a message's end."""


def check_goes_on(last: Mapping[str, Any]) -> None:
    """
    Raises:
        InvalidRequest: this last message is not an assistant's text.
    """
    if last.get("role") != "assistant":
        raise InvalidRequest(
            f"{FIELD}: the last message must be the assistant's, its role is {last.get('role')!r}", param=FIELD
        )
    if last.get("tool_calls") or last.get("function_call"):
        raise InvalidRequest(f"{FIELD}: the last message has tool calls, and nothing comes after those", param=FIELD)
    if last.get("content") is None:
        raise InvalidRequest(f"{FIELD}: the last message has no content to go on from", param=FIELD)


class OpenEnd:
    """Of the messages of one chat, as templates get them."""

    def __init__(self, messages: Sequence[Mapping[str, Any]]) -> None:
        self._content: str = messages[-1]["content"]
        self._mark = _MARK
        while any(self._mark in str(message.get("content")) for message in messages):
            self._mark += "_"
        self.messages = [*messages[:-1], {**messages[-1], "content": f"{self._content}{self._mark}{_AFTER}"}]
        """The last one is marked where its text ends."""

    def cut(self, rendered: str) -> str:
        """The prompt up to where the last message's text ends in it, for the last time if a template shows it again.

        Raises:
            InvalidRequest: the template left the message out, or changed it.
        """
        prompt, found, behind = rendered.rpartition(self._mark)
        if not found or self._content.strip() not in rendered:
            raise InvalidRequest(
                f"{FIELD}: the chat template does not show the last message as it is, so there is no place to go on "
                "from",
                param=FIELD,
            )
        prompt = prompt.replace(self._mark + _AFTER, "").replace(self._mark, "")
        return prompt if behind.startswith(_AFTER) else prompt.rstrip()
