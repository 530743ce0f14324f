"""The paths under /v1/responses: create, look up, delete, list what was asked, count."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Sequence
from typing import Any, Final

import orjson
from aiohttp import web

from disaggregated.errors import InvalidRequest, UnknownPreviousResponse, UnknownResponse
from orchestrator.admission.gate import Caller
from orchestrator.admission.make import CALLER_KEY
from orchestrator.api.bodies import received_body
from orchestrator.api.chat import chat_prompt
from orchestrator.api.drafts import Draft, known_model
from orchestrator.api.error_body import json_response
from orchestrator.api.fields import Fields, shown
from orchestrator.api.generate import start
from orchestrator.api.generation_fields import read_generation_fields
from orchestrator.api.jobs import chat_job_of
from orchestrator.api.responses.body import ResponsesBody, read_body
from orchestrator.api.responses.input_items import Message, messages_of
from orchestrator.api.responses.shape import ResponsesShape
from orchestrator.api.responses.truncation import truncated
from orchestrator.api.sampling_fields import TOKENS_MAX
from orchestrator.front_door import FrontDoor
from orchestrator.http.adapted import AdaptedRequest
from orchestrator.response_store import StoredResponse

INLINE_BYTES_MAX: Final = 1 << 16
"""Of a body: to look at its items takes two milliseconds."""
_ID_BYTES: Final = 24
_RESPONSE_ID: Final = re.compile(rf"resp_[0-9a-f]{{{2 * _ID_BYTES}}}")
_OUR_NAMES: Final = (
    ("messages", "input"),
    ("max_completion_tokens", "max_output_tokens"),
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
)
"""What chats call it, and what responses call it."""


async def create(door: FrontDoor, http: web.Request) -> web.StreamResponse:
    """
    Raises:
        InvalidRequest: names the field and the limit.
        UnknownPreviousResponse: `previous_response_id` is not kept here, or no longer.
    """
    arrived_s = door.clock()
    fields = Fields.parse(await received_body(http))
    known_model(door, fields)
    body = await _read(fields, await _conversation_before(door, http, fields))
    exchange = AdaptedRequest(http)
    try:
        draft = Draft(door, exchange, Fields(body.chat), arrived_s=arrived_s)
        if body.is_cut_to_fit:
            draft.body = Fields({**body.chat, "messages": await truncated(door, draft.model, body.chat)})
        shape = _shape(door, draft, body, owner=_owner(http))
        job = await chat_job_of(draft, shape, param="input")
    except InvalidRequest as error:
        raise _in_our_names(error) from error
    if body.tools.left_out:
        named = (job.headers.get("x-disagg-ignored"), *body.tools.left_out)
        job.headers["x-disagg-ignored"] = ",".join(name for name in named if name)[:1000]
    return await exchange.finish(start(door, exchange, job), door.outbox)


async def count(door: FrontDoor, http: web.Request) -> web.Response:
    """POST /v1/responses/input_tokens: what the same body would cost, without running it."""
    fields = Fields.parse(await received_body(http))
    model = known_model(door, fields, is_optional=True)
    body = await _read(fields, await _conversation_before(door, http, fields))
    chat = Fields(body.chat)
    try:
        read_generation_fields(chat, model, max_tokens_default=TOKENS_MAX)
        if body.is_cut_to_fit:
            chat = Fields({**body.chat, "messages": await truncated(door, model, body.chat)})
        ids = await chat_prompt(chat, model)
    except InvalidRequest as error:
        raise _in_our_names(error) from error
    return json_response({"object": "response.input_tokens", "input_tokens": len(ids)})


async def retrieve(door: FrontDoor, http: web.Request) -> web.Response:
    return web.Response(body=(await _stored(door, http)).response, content_type="application/json")


async def delete(door: FrontDoor, http: web.Request) -> web.Response:
    """For good, on whichever worker it is."""
    response_id, owner = http.match_info["response_id"], _owner(http)
    if not door.responses.discard(response_id, tenant=owner):
        stored = await door.siblings.response(response_id, tenant=owner, forget=True)
        if stored is None:
            raise _unknown(response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


async def input_items(door: FrontDoor, http: web.Request) -> web.Response:
    """The items of the request alone; the latest first, unless `order` is "asc"."""
    items = orjson.loads((await _stored(door, http)).input_items)
    if http.query.get("order", "desc") != "asc":
        items.reverse()
    ids = [item["id"] for item in items] or [""]
    return json_response({"object": "list", "data": items, "first_id": ids[0], "last_id": ids[-1], "has_more": False})


def _shape(door: FrontDoor, draft: Draft, body: ResponsesBody, *, owner: str) -> ResponsesShape:
    response_id = f"resp_{secrets.token_hex(_ID_BYTES)}"
    sampling = draft.fields.sampling
    response = {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "model": draft.model.name,
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "service_tier": "default",
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "usage": None,
        "user": draft.body.text("user"),
        **body.echo,
    }

    loop = asyncio.get_running_loop()

    def keep(ended: dict[str, Any]) -> None:
        """Also called on a thread, where a long answer is put together."""
        if body.stores:
            loop.call_soon_threadsafe(door.responses.put, response_id, _to_store(ended, body, owner))

    return ResponsesShape(response, keep=keep, tools=body.tools)


async def _read(fields: Fields, before: Sequence[Message]) -> ResponsesBody:
    """Many items are read on a thread. Raises as `read_body` does."""
    if fields.num_bytes <= INLINE_BYTES_MAX:
        return read_body(fields, before)
    return await asyncio.to_thread(read_body, fields, before)


async def _conversation_before(door: FrontDoor, http: web.Request, fields: Fields) -> Sequence[Message]:
    previous = fields.text("previous_response_id")
    if previous is None:
        return ()
    stored = await _found(door, http, previous)
    if stored is None:
        raise UnknownPreviousResponse(
            f"there is no response {shown(previous)}, or no longer", param="previous_response_id"
        )
    before: list[Message] = orjson.loads(stored.conversation)
    return before


async def _stored(door: FrontDoor, http: web.Request) -> StoredResponse:
    response_id = http.match_info["response_id"]
    stored = await _found(door, http, response_id)
    if stored is None:
        raise _unknown(response_id)
    return stored


async def _found(door: FrontDoor, http: web.Request, response_id: str) -> StoredResponse | None:
    """Kept by whichever worker answered it."""
    if not _RESPONSE_ID.fullmatch(response_id):
        return None
    owner = _owner(http)
    return door.responses.get(response_id, tenant=owner) or await door.siblings.response(response_id, tenant=owner)


def _unknown(response_id: str) -> UnknownResponse:
    return UnknownResponse(f"there is no response {shown(response_id)}, or no longer", param="response_id")


def _owner(http: web.Request) -> str:
    """With API keys, the key's name; what a body says of its user proves nothing."""
    caller: Caller = http[CALLER_KEY]
    return caller.tenant(None)


def _to_store(response: dict[str, Any], body: ResponsesBody, owner: str) -> StoredResponse:
    return StoredResponse(
        response=orjson.dumps(response),
        input_items=orjson.dumps(_listed(body.input_items)),
        conversation=orjson.dumps(messages_of(response["output"], "output", before=body.conversation)),
        tenant=owner,
    )


def _listed(items: Any) -> list[dict[str, Any]]:
    """In full: each item with an id and a type, a text as the message that it is short for."""
    if isinstance(items, str):
        items = [{"role": "user", "content": [{"type": "input_text", "text": items}]}]
    return [
        {**item, "id": item.get("id") or f"item_{secrets.token_hex(16)}", "type": item.get("type", "message")}
        for item in items
    ]


def _in_our_names(error: InvalidRequest) -> InvalidRequest:
    """What is wrong with the chat that a body was translated to, told of the body."""
    message, param = str(error), error.param or ""
    for theirs, ours in _OUR_NAMES:
        if param == theirs or param.startswith((f"{theirs}.", f"{theirs}[")):
            return type(error)(message.replace(theirs, ours), param=ours)
    return error
