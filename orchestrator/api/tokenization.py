"""POST /tokenize and /detokenize: what a prompt is to the model, without running it.

A chat is rendered and tokenized by the very code that serves chats, so the count here is the count there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from aiohttp import web

from disaggregated.errors import InvalidRequest
from orchestrator.api.bodies import received_body
from orchestrator.api.chat import chat_prompt
from orchestrator.api.drafts import known_model
from orchestrator.api.error_body import json_response
from orchestrator.api.fields import Fields, wrong_type
from orchestrator.api.prompts import checked_token_ids, encode
from orchestrator.front_door import FrontDoor
from orchestrator.served_model import ServedModel

T = TypeVar("T")

INLINE_TOKENS_MAX: Final = 1000
"""Up to here detokenizing takes half a millisecond; more goes to a thread."""
STRINGS_MAX: Final = 1 << 18
"""Tokens that are told as text: no thread is of help while their JSON is written."""


async def tokenize(door: FrontDoor, http: web.Request) -> web.Response:
    """`{"prompt": text}` or `{"messages": [...]}`, with the other fields of a chat that its template reads.

    Raises:
        InvalidRequest: names the field that is missing or wrong.
    """
    fields = Fields.parse(await received_body(http))
    model = known_model(door, fields, is_optional=True)
    shows_strings = fields.flag("return_token_strs")
    ids = await _ids_of(fields, model)
    if shows_strings and len(ids) > STRINGS_MAX:
        raise InvalidRequest(
            f"return_token_strs: the text has {len(ids)} tokens, the limit is {STRINGS_MAX}", param="return_token_strs"
        )
    strings = await _on_thread_if_long(model.tokenizer.pieces, ids) if shows_strings else None
    return json_response(
        {"count": len(ids), "max_model_len": door.num_tokens_max(model), "tokens": ids, "token_strs": strings}
    )


async def detokenize(door: FrontDoor, http: web.Request) -> web.Response:
    """`{"tokens": [ids]}`. Special tokens are shown, unless `skip_special_tokens` says otherwise.

    Raises:
        InvalidRequest: names the field that is missing or wrong.
    """
    fields = Fields.parse(await received_body(http))
    model = known_model(door, fields, is_optional=True)
    skips = fields.flag("skip_special_tokens")
    ids = fields.get("tokens")
    if ids is None:
        raise InvalidRequest("tokens is missing", param="tokens")
    if not isinstance(ids, list):
        raise wrong_type("tokens", "an array of token ids", ids)
    checked = checked_token_ids(ids, model.tokenizer.vocab_size, "tokens")

    def text_of(token_ids: Sequence[int]) -> str:
        return model.tokenizer.decode(token_ids, skip_special_tokens=skips)

    return json_response({"prompt": await _on_thread_if_long(text_of, checked)})


async def _ids_of(fields: Fields, model: ServedModel) -> list[int]:
    prompt, add_special_tokens = fields.text("prompt"), fields.flag("add_special_tokens", default=True)
    if prompt is None and fields.get("messages") is None:
        raise InvalidRequest("prompt is missing, and so is messages", param="prompt")
    if prompt is None:
        return await chat_prompt(fields, model)
    if fields.get("messages") is not None:
        raise InvalidRequest("there is a prompt and there are messages; give one of them", param="messages")
    return await encode(prompt, model, add_special_tokens=add_special_tokens, param="prompt")


async def _on_thread_if_long(function: Callable[[Sequence[int]], T], ids: Sequence[int]) -> T:
    if len(ids) <= INLINE_TOKENS_MAX:
        return function(ids)
    return await asyncio.to_thread(function, ids)
