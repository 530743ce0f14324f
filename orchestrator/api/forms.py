"""What bodies ask for beside their prompts, read once for all that ask for the same.

A client sends the same fields with every request, an agent the same thirty tools with every turn: what they come to
depends on nothing else, so the second time it is looked up.
"""

from __future__ import annotations

from typing import Final

import orjson

from disaggregated.bounded_cache import BoundedCache
from orchestrator.api.chat import ChatForm, is_small
from orchestrator.api.fields import Fields
from orchestrator.api.generation_fields import GenerationFields, read_generation_fields
from orchestrator.api.sampling_fields import TOKENS_MAX
from orchestrator.served_model import ServedModel

COMPLETION_TOKENS_DEFAULT: Final = 16
"""OpenAI's, for text completions; a chat may fill what its prompt leaves."""

KEPT_BYTES_MAX: Final = 1 << 20
"""Of the fields as JSON; what they are read as may take ten times as much."""
FORM_BYTES_MAX: Final = 1 << 16
OF_ONE_REQUEST: Final = frozenset(
    {
        "seed", "user", "metadata", "request_id", "safety_identifier", "prompt_cache_key",
        "session_id", "conversation_id", "conversation_params",
    }
)  # fmt: skip
"""Fields that no form has anything of, as it has nothing of the prompt: each request reads them itself."""


class Form:
    __slots__ = ("chat", "fields", "ignored", "is_plain")

    def __init__(self, fields: GenerationFields) -> None:
        self.fields = fields
        """But for its seed, which is another request's."""
        self.chat: ChatForm | None = None
        """Of a chat, once that was read."""
        self.ignored = ",".join(name for name in fields.unknown if name.isidentifier())[:1000]
        """Fields that mean nothing here, as a header names them."""
        self.is_plain = not (fields.stream or fields.stop) and fields.reply.is_one_text
        """The answer is one whole reply, and all of that is text, if the chat's own fields allow it."""


class Forms:
    """Of one model, and of chats or of text completions."""

    def __init__(self, model: ServedModel, *, is_chat: bool) -> None:
        self._model = model
        self._is_chat = is_chat
        self._left_out = OF_ONE_REQUEST | {"messages" if is_chat else "prompt"}
        self._kept: BoundedCache[bytes, Form] = BoundedCache(KEPT_BYTES_MAX, entry_max=FORM_BYTES_MAX)

    def of(self, body: Fields) -> Form:
        """
        Raises:
            InvalidRequest: names the field that is wrong.
        """
        read = {name: value for name, value in body.values.items() if name not in self._left_out}
        if body.num_bytes > FORM_BYTES_MAX and not is_small(read, FORM_BYTES_MAX):
            return Form(self._read(body))
        try:
            key = orjson.dumps(read)
        except orjson.JSONEncodeError:  # Text that is not Unicode: whoever reads the field says so.
            return Form(self._read(body))
        form = self._kept.get(key)
        if form is None:
            form = Form(self._read(body))
            self._kept.keep(key, form, size=len(key))
        return form

    def _read(self, body: Fields) -> GenerationFields:
        max_tokens = TOKENS_MAX if self._is_chat else COMPLETION_TOKENS_DEFAULT
        return read_generation_fields(body, self._model, max_tokens_default=max_tokens, is_chat=self._is_chat)
