"""Where requests on connections of our own come in, and errors become answers."""

from __future__ import annotations

import orjson

from orchestrator.api.direct import answer
from orchestrator.api.generate import generate
from orchestrator.api.refusals import refusal_of
from orchestrator.api.request_ids import request_id_for
from orchestrator.front_door import FrontDoor
from orchestrator.http.connection import WholeRequest
from orchestrator.http.exchange import Rest
from orchestrator.http.heads import CHAT_PATH


def serve(door: FrontDoor, exchange: WholeRequest) -> Rest | None:
    """Let it in and begin its answer. What is returned, if anything, has to be awaited for it. Raises nothing."""
    try:
        arrived_s = door.clock()
        exchange.request_id = request_id_for(exchange.headers)
        exchange.caller = door.gate.let_in(exchange.path, exchange.headers)
        is_chat = exchange.path == CHAT_PATH
        return generate(door, exchange, exchange.body, is_chat=is_chat, arrived_s=arrived_s)
    except Exception as error:  # noqa: BLE001 - the process's edge: one request's bug is one 500 and a traceback
        exchange.refuse(error)
        return None


def refuse(door: FrontDoor, exchange: WholeRequest, error: Exception) -> None:
    """The error is its answer. If something of another one has left, the connection is of no use any more."""
    refusal = refusal_of(door, error, method="POST", path=exchange.path)
    if exchange.has_begun and exchange.transport is not None:
        exchange.transport.abort()
        return
    request_id = exchange.request_id or request_id_for(exchange.headers)
    headers = {**refusal.headers, "x-request-id": request_id}
    if headers.pop("Connection", "") == "close":
        exchange.keep_alive = False
    body = orjson.dumps(refusal.fields)
    answer(exchange, body, headers, door.outbox, status=refusal.status, kind="application/json")
