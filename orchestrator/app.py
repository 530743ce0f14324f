"""The front door as an aiohttp application: routes, request ids, and what becomes of errors."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import orjson
from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Handler, Middleware

from disaggregated.config.deployment import DeploymentConfig
from orchestrator.admission.make import CALLER_KEY
from orchestrator.admission.quotas import Levels
from orchestrator.api import generate, operations, tokenization
from orchestrator.api.bodies import received_body
from orchestrator.api.error_body import json_response, plain_fields
from orchestrator.api.openapi.document import index, openapi
from orchestrator.api.refusals import refusal_of
from orchestrator.api.request_ids import request_id_for
from orchestrator.api.responses import endpoints as responses
from orchestrator.front_door import FrontDoor
from orchestrator.http.adapted import REQUEST_ID_KEY, AdaptedRequest
from orchestrator.scaler import Scaler
from orchestrator.served_model import ServedModel
from orchestrator.server_pools import ServerPools
from orchestrator.siblings import Siblings

_RESPONSE_PATH: Final = "/v1/responses/{response_id:resp_[0-9a-f]+}"
DOOR: Final = web.AppKey("door", FrontDoor)

DoorHandler = Callable[[FrontDoor, web.Request], Awaitable[web.StreamResponse]]


def make_app(
    config: DeploymentConfig,
    pools: ServerPools,
    *,
    model: ServedModel | None = None,
    scaler: Scaler | None = None,
    siblings: Siblings | None = None,
    levels: Levels | None = None,
) -> web.Application:
    """The application owns `pools` from its start-up to its clean-up.

    `siblings` and `levels` are of other workers at the same port: who they are, and how much of their quotas is left.
    Without `model`, the tokenizer is loaded in the background: the configured one, or what the first server tells.
    """
    door = FrontDoor(config, pools, model=model, scaler=scaler, siblings=siblings, levels=levels)
    app = web.Application(client_max_size=config.door.body_bytes_max, middlewares=[_edge(door)])
    app[DOOR] = door
    for method, path, handler in (
        ("GET", "/", index),
        ("POST", "/v1/chat/completions", _chat_completions),
        ("POST", "/v1/completions", _completions),
        ("POST", "/v1/responses", responses.create),
        ("POST", "/v1/responses/input_tokens", responses.count),
        ("GET", _RESPONSE_PATH, responses.retrieve),
        ("DELETE", _RESPONSE_PATH, responses.delete),
        ("GET", f"{_RESPONSE_PATH}/input_items", responses.input_items),
        ("POST", "/tokenize", tokenization.tokenize),
        ("POST", "/v1/tokenize", tokenization.tokenize),
        ("POST", "/detokenize", tokenization.detokenize),
        ("POST", "/v1/detokenize", tokenization.detokenize),
        ("GET", "/v1/models", operations.models),
        ("GET", "/health", operations.health),
        ("GET", "/metrics", operations.metrics),
        ("GET", "/prometheus/metrics", operations.metrics),
        ("GET", "/version", operations.version),
        ("GET", "/openapi.json", openapi),
        ("GET", "/cluster_info", operations.cluster_info),
        ("POST", "/cluster/scale", operations.scale),
        ("GET", "/requests/{request_id:.+}", operations.request_story),
        ("GET", "/ledger", operations.ledger),
    ):
        app.router.add_route(method, path, functools.partial(_call, door, handler), expect_handler=_expect)

    async def life(_: web.Application) -> AsyncIterator[None]:
        door.start()
        yield
        await door.close()

    app.cleanup_ctx.append(life)
    return app


async def _call(door: FrontDoor, handler: DoorHandler, http: web.Request) -> web.StreamResponse:
    return await handler(door, http)


async def _expect(http: web.Request) -> None:
    """Of whoever asks first whether to send the body."""
    if http.version < HttpVersion11:
        return
    if http.headers["Expect"].lower() != "100-continue":
        message = "nothing but 100-continue may be expected here"
        told = orjson.dumps(plain_fields(message)).decode()
        raise web.HTTPExpectationFailed(text=told, content_type="application/json")
    await http.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    http.writer.output_size = 0  # The answer has not begun.


async def _chat_completions(door: FrontDoor, http: web.Request) -> web.StreamResponse:
    return await _generate(door, http, is_chat=True)


async def _completions(door: FrontDoor, http: web.Request) -> web.StreamResponse:
    return await _generate(door, http, is_chat=False)


async def _generate(door: FrontDoor, http: web.Request, *, is_chat: bool) -> web.StreamResponse:
    """A request that no connection of ours took: with a large body, in chunks, of HTTP/1.0 …"""
    arrived_s = door.clock()
    body = await received_body(http)
    exchange = AdaptedRequest(http)
    rest = generate.generate(door, exchange, body, is_chat=is_chat, arrived_s=arrived_s)
    return await exchange.finish(rest, door.outbox)


def _edge(door: FrontDoor) -> Middleware:
    @web.middleware
    async def edge(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[REQUEST_ID_KEY] = request_id = request_id_for(request.headers)
        response = await _answered(door, request, handler)
        if not response.prepared:
            response.headers["x-request-id"] = request_id
        return response

    return edge


async def _answered(door: FrontDoor, http: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        http[CALLER_KEY] = door.gate.let_in(http.path, http.headers)
        return await handler(http)
    except Exception as error:  # noqa: BLE001 - the process's edge: one request's bug is one 500 and a traceback
        refusal = refusal_of(door, error, method=http.method, path=http.path)
        return json_response(refusal.fields, status=refusal.status, headers=refusal.headers)
