"""Bodies drawn from the front door's own document, and answers held against it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

import hypothesis
import jsonschema
import pytest
import pytest_asyncio

from orchestrator.api.openapi.document import document
from tests.support.front_door import Door, front_door
from tests.support.schema_values import inlined, values_of

DOCUMENT: Final = document(["fake"])
POSTS: Final = sorted(
    path for path, methods in DOCUMENT["paths"].items() if "post" in methods and path != "/cluster/scale"
)
NUM_BODIES: Final = 25
SURE_OF_THEMSELVES: Final = ("/detokenize", "/v1/completions", "/v1/responses/input_tokens")
"""Where most of what the document allows is good: chats have messages and tools that only mean something together."""


def drawn(schema: Any) -> list[Any]:
    """The same ones each time."""
    bodies: list[Any] = []

    @hypothesis.settings(
        max_examples=NUM_BODIES,
        database=None,
        derandomize=True,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(values_of(schema))
    def collect(body: Any) -> None:
        bodies.append(body)

    collect()
    return bodies


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door() -> AsyncIterator[Door]:
    async with front_door(num_tokens_max=96, num_generation=2) as opened:
        yield opened


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", POSTS)
async def test_bodies_of_the_document_get_answers_of_the_document(path: str, door: Door) -> None:
    operation = DOCUMENT["paths"][path]["post"]
    num_good = 0
    for body in drawn(inlined(DOCUMENT, operation["requestBody"]["content"]["application/json"]["schema"])):
        async with door.http.post(door.url + path, json=body) as answer:
            told = operation["responses"].get(str(answer.status))
            assert told is not None, (answer.status, body)
            assert answer.content_type in told["content"], (answer.content_type, body)
            content = await answer.read()
            if answer.content_type == "application/json":
                schema = inlined(DOCUMENT, told["content"]["application/json"]["schema"])
                jsonschema.Draft202012Validator(schema).validate(await answer.json())
            num_good += answer.status == 200
            assert answer.status < 500, (body, content)
    if path in SURE_OF_THEMSELVES:
        assert num_good >= NUM_BODIES / 4
