"""What the front door says of itself is what it does."""

from __future__ import annotations

from typing import Any, Final

import pytest

from disaggregated.config.deployment import DeploymentConfig, PoolConfig
from disaggregated.config.server import ServerConfig
from orchestrator.api.generation_fields import read_generation_fields
from orchestrator.api.known_fields import IGNORED, NEUTRAL, TAKEN
from orchestrator.api.openapi import bodies
from orchestrator.api.openapi.document import document
from orchestrator.api.responses.body import read_body
from orchestrator.app import make_app
from orchestrator.parsers.formats import TEXT_ONLY
from orchestrator.server_pools import ServerPools
from tests.support.byte_model import byte_model
from tests.support.front_door import front_door
from tests.support.read_chat import read_chat
from tests.support.recorded_fields import RecordedFields

SCHEMAS: Final[dict[str, Any]] = document()["components"]["schemas"]
USER: Final = [{"role": "user", "content": "x"}]
WRITTEN_OTHERWISE: Final = frozenset({"model", "logprobs"})
"""The model has to be there, and `logprobs` is of two types in text completions."""


def disagreements(read: RecordedFields, properties: dict[str, Any]) -> list[str]:
    wrong = []
    for name, seen in read.read.items():
        told = properties.get(name)
        if told is None:
            wrong.append(f"{name} is read, and not described")
        elif seen is not None and name not in WRITTEN_OTHERWISE:
            odd = (key for key in seen if told.get(key) != seen[key])
            wrong += [f"{name}: {key} is {told.get(key)}, not {seen[key]}" for key in odd]
    return wrong


@pytest.mark.parametrize(("schema", "is_chat"), [("ChatCompletionRequest", True), ("CompletionRequest", False)])
def test_limits_and_types_are_those_that_bodies_are_checked_with(schema: str, is_chat: bool) -> None:
    read = RecordedFields({"max_tokens": 0, "prompt_logprobs": 1})
    read_generation_fields(read, byte_model(), max_tokens_default=5, is_chat=is_chat)
    assert not disagreements(read, SCHEMAS[schema]["properties"])


async def test_a_chat_s_own_fields_are_described() -> None:
    read = RecordedFields({"messages": USER})
    await read_chat(read, byte_model(), TEXT_ONLY, grammar=None, allows_template=False)
    assert not disagreements(read, SCHEMAS["ChatCompletionRequest"]["properties"])


def test_the_fields_of_responses_are_described() -> None:
    read = RecordedFields({"input": "x"})
    read_body(read, ())
    not_theirs = {"messages", "max_tokens", "max_completion_tokens", "response_format", "functions", "function_call"}
    for name in (*not_theirs, "logprobs"):
        read.read.pop(name, None)
    assert not disagreements(read, SCHEMAS["ResponsesRequest"]["properties"])


def test_every_field_of_the_tables_is_described() -> None:
    described = set(SCHEMAS["ChatCompletionRequest"]["properties"]) | set(SCHEMAS["CompletionRequest"]["properties"])
    assert TAKEN | IGNORED | set(NEUTRAL) <= described
    assert described <= TAKEN | IGNORED | set(NEUTRAL), "described, and not known to the check"


def test_every_property_says_what_it_is_for() -> None:
    for name in (*bodies.SAMPLING, *bodies.REPLY, *bodies.TEMPLATE, *bodies.COMMON):
        schema = {**bodies.COMMON, **bodies.TEMPLATE}[name]
        assert "$ref" in schema or schema["description"], name


async def test_every_path_is_described_and_every_description_is_a_path() -> None:
    context, generation = (
        PoolConfig(num_instances=1, urls=("127.0.0.1:1",), server=ServerConfig(model="fake", role=role))
        for role in ("context", "generation")
    )
    config = DeploymentConfig(context=context, generation=generation)
    app = make_app(config, ServerPools(config), model=byte_model())
    routes = {(route.resource.canonical, route.method.lower()) for route in app.router.routes() if route.resource}
    described = {(path, method) for path, methods in document()["paths"].items() for method in methods}
    assert described == {(path, method) for path, method in routes if method != "head"}


async def test_who_opens_the_address_in_a_browser_sees_what_there_is() -> None:
    async with front_door(is_awaited=False) as door, door.http.get(door.url) as answer:
        assert (answer.status, answer.content_type) == (200, "text/plain")
        lines = (await answer.text()).splitlines()
    for path, methods in document()["paths"].items():
        for method in methods:
            assert any(line.split()[:2] == [method.upper(), path] for line in lines)


async def test_the_document_is_served() -> None:
    async with front_door() as door:
        status, told = await door.get("/openapi.json")
    assert (status, told) == (200, document(["house/fake", "fake"]))
    assert told["components"]["schemas"]["ModelName"]["enum"] == ["house/fake", "fake"]


def test_references_lead_somewhere() -> None:
    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [*([value["$ref"]] if "$ref" in value else []), *(r for v in value.values() for r in references(v))]
        return [r for v in value for r in references(v)] if isinstance(value, list) else []

    for reference in references(document()):
        assert reference.removeprefix("#/components/schemas/") in SCHEMAS
