"""GET /openapi.json: every path of the front door, put together once."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson
from aiohttp import web

from disaggregated import __version__
from orchestrator.api.openapi import answers, bodies
from orchestrator.api.openapi.kinds import Schema, ref
from orchestrator.front_door import FrontDoor

_JSON: Final = "application/json"
_TEXT: Final[Schema] = {"text/plain": {"schema": {"type": "string"}}}
_ERRORS: Final[Mapping[str, str]] = {
    "400": "A field is wrong; the message names it and its limit.",
    "401": "No API key, or one that is not known.",
    "403": "The key is good, but not for this.",
    "404": "There is no such model, response or request.",
    "413": "The body is too large.",
    "429": "Too many requests wait, or a quota is used up; Retry-After tells when to come back.",
    "503": "No server is ready; Retry-After tells when to come back.",
    "504": "The request's deadline passed.",
}
_PATH_IDS: Final[Mapping[str, str]] = {
    "response_id": "As `id` of a response.",
    "request_id": "As the answer's header x-request-id.",
}


async def openapi(door: FrontDoor, http: web.Request) -> web.Response:
    return web.Response(body=_encoded(door.model_names), content_type=_JSON)


async def index(door: FrontDoor, http: web.Request) -> web.Response:
    """For whoever opens the address in a browser: what there is, in a line each."""
    lines = [f"disaggregated {__version__}", ""]
    for path, methods in _paths().items():
        lines += [f"{method.upper():7}{path:42}{does['summary']}" for method, does in methods.items()]
    return web.Response(text="\n".join([*lines, ""]))


@functools.lru_cache(maxsize=1)
def _encoded(model_names: tuple[str, ...]) -> bytes:
    return orjson.dumps(document(model_names))


def document(model_names: Sequence[str] = ()) -> dict[str, Any]:
    """`model_names`: all that the served model is called, once it is known."""
    named = {"enum": list(model_names)} if model_names else {}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Disaggregated serving",
            "version": __version__,
            "description": "OpenAI's API over context servers that prefill and generation servers that decode. "
            "A field that is null counts as absent; one that is not known here is named in the answer's header "
            "x-disagg-ignored.",
        },
        "paths": _paths(),
        "components": {
            "schemas": {**bodies.SCHEMAS, **answers.SCHEMAS, "ModelName": {**bodies.MODEL_NAME, **named}},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"bearer": []}],
    }


def _paths() -> dict[str, Any]:
    tokenize = _post("Token ids of a text or a chat, without running it.", "TokenizeRequest", "Tokenized")
    detokenize = _post("The text of token ids.", "DetokenizeRequest", "Detokenized")
    metrics = _get("Prometheus metrics.", _TEXT)
    return {
        "/": _get("This list, as text.", _TEXT),
        "/v1/chat/completions": _post("A chat.", "ChatCompletionRequest", "ChatCompletion", streams=True),
        "/v1/completions": _post("A text goes on.", "CompletionRequest", "Completion", streams=True),
        "/v1/responses": _with_links(
            _post("A response, and those before it.", "ResponsesRequest", "Response", streams=True)
        ),
        "/v1/responses/input_tokens": _post("What its input would cost.", "ResponsesRequest", "InputTokens"),
        "/v1/responses/{response_id}": {
            "get": _operation("A response that is kept.", _json("Response"), "response_id", name="getResponse"),
            "delete": _operation("Forget it.", _json("DeletedResponse"), "response_id", name="deleteResponse"),
        },
        "/v1/responses/{response_id}/input_items": {
            "get": _operation("What was asked.", _json("List"), "response_id", name="getInputItems")
        },
        "/tokenize": tokenize,
        "/v1/tokenize": tokenize,
        "/detokenize": detokenize,
        "/v1/detokenize": detokenize,
        "/v1/models": _get("The model that is served.", _json("Models")),
        "/health": _get("200 only while requests can be served.", _json("Object")),
        "/metrics": metrics,
        "/prometheus/metrics": metrics,
        "/version": _get("Of this software.", _json("Object")),
        "/openapi.json": _get("This.", _json("Object")),
        "/cluster_info": _get("Every server, as it is now.", _json("Object")),
        "/cluster/scale": _post("So many servers of a role.", "ScaleRequest", "Object"),
        "/requests/{request_id}": _get("What became of a request.", _json("Object"), "request_id"),
        "/ledger": _get("Who holds which blocks.", _json("Object")),
    }


def _with_links(path: dict[str, Any]) -> dict[str, Any]:
    """What can be done next with the id that it answers."""
    path["post"]["responses"]["200"]["links"] = {
        name: {"operationId": name, "parameters": {"response_id": "$response.body#/id"}}
        for name in ("getResponse", "deleteResponse", "getInputItems")
    }
    return path


def _json(schema: str) -> Schema:
    return {_JSON: {"schema": ref(schema)}}


def _get(about: str, content: Schema, *ids: str) -> dict[str, Any]:
    return {"get": _operation(about, content, *ids)}


def _post(about: str, body: str, answer: str, *, streams: bool = False) -> dict[str, Any]:
    content = {
        **_json(answer),
        **({"text/event-stream": {"schema": {"description": "Events; their data is JSON."}}} if streams else {}),
    }
    return {
        "post": {
            **_operation(about, content),
            "requestBody": {"required": True, "content": _json(body)},
        }
    }


def _operation(about: str, content: Schema, *ids: str, name: str = "") -> dict[str, Any]:
    errors = {
        status: {"description": why, "content": {_JSON: {"schema": answers.ERROR}}} for status, why in _ERRORS.items()
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "description": _PATH_IDS[name], "schema": {"type": "string"}}
        for name in ids
    ]
    return {
        "summary": about,
        "responses": {"200": {"description": "Done.", "content": content}, **errors},
        **({"parameters": parameters} if parameters else {}),
        **({"operationId": name} if name else {}),
    }
