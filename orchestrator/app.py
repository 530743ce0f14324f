"""The front door as an aiohttp application: routes, request ids, and the one place where errors become HTTP."""

from __future__ import annotations

import functools
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from disaggregated import logs
from disaggregated.config.deployment import DeploymentConfig
from disaggregated.errors import DisaggregatedError
from orchestrator.admission.make import CALLER_KEY
from orchestrator.admission.quotas import Levels
from orchestrator.api import generate, operations, tokenization
from orchestrator.api.bodies import BODY_TIMEOUT_S
from orchestrator.api.error_body import error_response, plain_error_response
from orchestrator.api.openapi.document import openapi
from orchestrator.api.request_ids import assign_request_id
from orchestrator.api.responses import endpoints as responses
from orchestrator.front_door import FrontDoor
from orchestrator.scaler import Scaler
from orchestrator.served_model import ServedModel
from orchestrator.server_pools import ServerPools
from orchestrator.siblings import Siblings

log = logs.get(__name__)

SHUTDOWN_TIMEOUT_S: Final = 60.0
"""For requests under way when the application is cleaned up; whoever cleans up may be less patient."""
KEEPALIVE_S: Final = 60.0
"""A connection on which no whole head of a request has come for so long is closed."""
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
        ("POST", "/v1/chat/completions", generate.chat_completions),
        ("POST", "/v1/completions", generate.completions),
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
        app.router.add_route(method, path, functools.partial(_call, door, handler))

    async def life(_: web.Application) -> AsyncIterator[None]:
        door.start()
        yield
        await door.close()

    app.cleanup_ctx.append(life)
    return app


def make_runner(app: web.Application, *, shutdown_timeout_s: float = SHUTDOWN_TIMEOUT_S) -> web.AppRunner:
    """A client that hangs up cancels its handler, and with it the work on every server."""
    return web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=shutdown_timeout_s,
        keepalive_timeout=KEEPALIVE_S,
    )


async def _call(door: FrontDoor, handler: DoorHandler, http: web.Request) -> web.StreamResponse:
    return await handler(door, http)


def _edge(door: FrontDoor) -> Middleware:
    @web.middleware
    async def edge(request: web.Request, handler: Handler) -> web.StreamResponse:
        request_id = assign_request_id(request)
        response = await _answered(door, request, handler)
        if not response.prepared:
            response.headers["x-request-id"] = request_id
        return response

    return edge


async def _answered(door: FrontDoor, http: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        http[CALLER_KEY] = door.gate.let_in(http.path, http.headers)
        return await handler(http)
    except DisaggregatedError as error:
        door.metrics.error_answered(error)
        return error_response(error, retry_after_s=door.dispatcher.retry_after_s())
    except web.HTTPException as error:
        return _refused_by_http(door, http, error)
    except Exception as error:  # noqa: BLE001 - the process's edge: one request's bug is one 500 and a traceback
        log.traceback("handler_crashed", error)
        door.metrics.crash_answered()
        return plain_error_response("internal error", status=500, kind="internal_error")


def _refused_by_http(door: FrontDoor, http: web.Request, error: web.HTTPException) -> web.Response:
    headers: dict[str, str] = {}
    match error:
        case web.HTTPRequestEntityTooLarge():
            message = f"the body is larger than the limit of {door.config.door.body_bytes_max} bytes"
        case web.HTTPRequestTimeout():
            message = f"the body did not come in {BODY_TIMEOUT_S:g} s"
            headers["Connection"] = "close"
        case web.HTTPNotFound():
            message = f"there is no {http.method} {_shown(http.path)}"
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            headers["Allow"] = allowed
            message = f"{_shown(http.path)} takes {allowed}, not {_shown(http.method)}"
        case _:
            message = error.reason
    response = plain_error_response(message, status=error.status)
    response.headers.update(headers)
    return response


def _shown(path: str) -> str:
    return re.sub(r"[^\x20-\x7e]", "?", path)[:200]
