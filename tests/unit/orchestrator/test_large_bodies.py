"""Bodies as large as they may be, and made to cost much: each is refused soon, and holds nobody else up meanwhile."""

from __future__ import annotations

import io
import json
import time
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest
import pytest_asyncio

from disaggregated.config.door import DoorConfig
from orchestrator.loop_lag import LoopLag
from tests.support.front_door import Door, front_door
from tests.support.loop_cpu import frozen_garbage

CHAT: Final = "/v1/chat/completions"
TEXT: Final = "/v1/completions"
RESPONSES: Final = "/v1/responses"
LATE_MAX_S: Final = 0.1
"""By the clock, and with the client on the same loop, who takes half of it."""
NUM_ATTEMPTS: Final = 4
ANSWER_S: Final = 2.0
BYTES: Final = DoorConfig().body_bytes_max - 1000
USER: Final = [{"role": "user", "content": "x"}]
SURE: Final = "the body has "


def text(**fields: Any) -> bytes:
    return json.dumps({"model": "fake", "prompt": "Hi", "max_tokens": 2, **fields}).encode()


def filled(unit: str, *, field: str = "wizardry", ends: str = "0") -> bytes:
    """A body with an array of as many of `unit` as there is room for."""
    return (
        f'{{"model":"fake","prompt":"Hi","max_tokens":2,"{field}":['.encode()
        + (unit + ",").encode() * ((BYTES - 100) // (len(unit) + 1))
        + f"{ends}]}}".encode()
    )


def called(arguments: str) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    calls = [{"id": "c", "type": "function", "function": function}]
    return {"model": "fake", "messages": [{"role": "assistant", "tool_calls": calls}, *USER]}


LONG: Final = "ab " * (BYTES // 3)
COSTLY: Final[dict[str, tuple[str, bytes | dict[str, Any], str | None, str]]] = {
    "empty objects": (TEXT, filled("{}"), None, SURE),
    "arrays in arrays": (TEXT, filled("[" * 100 + "]" * 100), None, SURE),
    "objects": (CHAT, filled('{"role":"user","content":""}', field="messages"), None, SURE),
    "numbers": (TEXT, filled("1.5"), None, SURE),
    "strings": (TEXT, filled('""', field="stop"), None, SURE),
    "names": (TEXT, text(logit_bias={str(number): 1 for number in range(400_000)}), None, SURE),
    "a long text": (TEXT, {"model": "fake", "prompt": LONG}, "prompt", "more than 1024 tokens"),
    "a long text to be cut": (
        TEXT,
        {"model": "fake", "prompt": LONG, "truncate_prompt_tokens": 9},
        "prompt",
        "more than 262144 tokens",
    ),
    "a long message": (
        CHAT,
        {"model": "fake", "messages": [{"role": "user", "content": LONG}]},
        "messages",
        "more than 1024 tokens",
    ),
    "a long input": (RESPONSES, {"model": "fake", "input": LONG}, "input", "more than 1024 tokens"),
    "many calls in a row": (
        RESPONSES,
        {
            "model": "fake",
            "input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}] * 15_000,
        },
        "input",
        "more than 1024 tokens",
    ),
    "many includes": (
        RESPONSES,
        {"model": "fake", "input": "x", "include": ["message.output_text.logprobs"] * 200_000},
        "include",
        "200000 strings, the limit is 64",
    ),
    "many tools": (
        RESPONSES,
        {"model": "fake", "input": "x", "tools": [{"type": "function", "name": "f"}] * 20_000},
        "tools",
        "20000 tools, the limit is 512",
    ),
    "JSON in a string": (
        CHAT,
        called("[" + "[]," * 1_000_000 + "0]"),
        "messages[0].tool_calls[0].function.arguments",
        "JSON values, the limit is 262144",
    ),
    "a schema in a string": (
        TEXT,
        text(guided_json='{"enum":[' + "[]," * 1_000_000 + "0]}"),
        "guided_json",
        "3000012 characters, the limit is 262144",
    ),
    "a structural tag in a string": (
        TEXT,
        text(structured_outputs={"structural_tag": "[" * 1_000_000}),
        "structured_outputs.structural_tag",
        "1000000 characters, the limit is 262144",
    ),
    "a schema": (TEXT, text(guided_json={"enum": [0] * 400_000}), "guided_json", "bytes, the limit is 131072"),
    "a long name of a model": (TEXT, text(model="x" * 1_000_000), "model", "the model 'xxxx"),
    "a long role": (CHAT, {"model": "fake", "messages": [{"role": "x" * 1_000_000}]}, "messages[0].role", "is 'xxxx"),
    "a long stop string": (TEXT, text(stop="x" * 1_000_000), "stop", "1000000 characters, the limit is 2048"),
    "a long text as strings": (
        "/tokenize",
        {"prompt": "a" * 300_000, "return_token_strs": True},
        "return_token_strs",
        "300000 tokens, the limit is 262144",
    ),
}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def door() -> AsyncIterator[Door]:
    async with front_door() as opened:
        yield opened


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("what", COSTLY)
async def test_a_body_is_refused_soon_that_is_made_to_cost_much(what: str, door: Door) -> None:
    path, fields, param, message = COSTLY[what]
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    late_s: list[float] = []
    while min(late_s, default=1.0) >= LATE_MAX_S and len(late_s) < NUM_ATTEMPTS:
        began_s = time.process_time()
        lag = LoopLag(lambda _: None, interval_s=0.005)
        lag.start()
        with frozen_garbage():
            status, answer = await door.post(path, io.BytesIO(body))
        lag.stop()
        late_s.append(lag.longest_s)
        assert time.process_time() - began_s < ANSWER_S
        assert status in (400, 404), answer
        assert answer["error"]["param"] == param
        assert message in answer["error"]["message"]
        assert len(answer["error"]["message"]) < 1000
    assert min(late_s) < LATE_MAX_S, late_s
    await door.wait_idle()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_long_text_without_a_use_is_no_reason_to_refuse(door: Door) -> None:
    status, answer = await door.post(TEXT, io.BytesIO(text(user="é[{:,." * 600_000)))
    assert status == 200, answer
