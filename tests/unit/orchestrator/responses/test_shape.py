"""However a reply is made up, its stream is well formed, and says what the whole answer says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
import pydantic
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent

from disaggregated.errors import ServerLost
from orchestrator.api.responses.shape import ResponsesShape
from orchestrator.api.shapes import Reply, Usage
from orchestrator.parsers import CallArguments, CallStart, Content, Delta, Reasoning, joined

BEGUN: dict[str, Any] = {
    "id": "resp_1", "object": "response", "created_at": 1, "model": "m", "parallel_tool_calls": True,
    "tool_choice": "auto", "tools": [], "error": None,
}  # fmt: skip
USAGE = Usage(5, 2, 3)
OPENAI_EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)


@st.composite
def replies(draw: st.DrawFn) -> list[Delta]:
    """Reasoning, then content and calls in any order, each in any number of bits."""
    bits = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=3)
    deltas: list[Delta] = [Reasoning(text) for text in draw(st.one_of(st.just([]), bits))]
    num_calls = 0
    for is_call in draw(st.lists(st.booleans(), max_size=4)):
        if is_call:
            deltas.append(CallStart(num_calls, f"call_{num_calls}", "f"))
            deltas += [CallArguments(num_calls, text) for text in draw(bits)]
            num_calls += 1
        else:
            deltas += [Content(text) for text in draw(bits)]
    return deltas


def streamed(deltas: Sequence[Delta], finish_reason: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The events, and the responses that were kept."""
    kept: list[dict[str, Any]] = []
    shape = ResponsesShape(BEGUN, keep=kept.append)
    body = shape.opening(0)
    for delta in deltas:
        body += shape.deltas(0, [delta], None)
    body += shape.finish(0, finish_reason) + shape.usage(USAGE) + shape.closing
    return events_of(body), kept


def events_of(body: bytes) -> list[dict[str, Any]]:
    blocks = body.decode().split("\n\n")
    assert blocks.pop() == ""
    events = []
    for block in blocks:
        kind, event = block.split("\n", 1)
        events.append(orjson.loads(event.removeprefix("data: ")))
        assert kind == f"event: {events[-1]['type']}"
    return events


@given(replies(), st.sampled_from(["stop", "length", "tool_calls"]))
def test_events_are_numbered_typed_and_nested(deltas: list[Delta], finish_reason: str) -> None:
    events, kept = streamed(deltas, finish_reason)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == ("response.incomplete" if finish_reason == "length" else "response.completed")
    assert [events[-1]["response"]] == kept
    open_item = None
    for event in events[2:-1]:
        OPENAI_EVENT.validate_python(event)
        if event["type"] == "response.output_item.added":
            assert open_item is None
            open_item = event["output_index"]
        assert event["output_index"] == open_item
        if event["type"] == "response.output_item.done":
            open_item = None
    assert open_item is None


@given(replies(), st.sampled_from(["stop", "length", "tool_calls"]))
def test_a_stream_adds_up_to_the_whole_answer(deltas: list[Delta], finish_reason: str) -> None:
    events, _ = streamed(deltas, finish_reason)
    kept: list[dict[str, Any]] = []
    whole = orjson.loads(
        ResponsesShape(BEGUN, keep=kept.append).whole([Reply(joined(deltas), finish_reason, None)], USAGE)
    )
    Response.model_validate(whole)
    assert without_ids(whole) == without_ids(events[-1]["response"])
    assert kept == [whole]
    for item in events[-1]["response"]["output"]:
        said = "".join(e["delta"] for e in events if e["type"].endswith(".delta") and e["item_id"] == item["id"])
        assert said == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    output = [{**item, "id": ""} for item in response["output"]]
    return {**response, "output": output, "completed_at": 0}


def test_white_space_between_calls_is_nobody_s_message() -> None:
    deltas: list[Delta] = [
        Content("\n"), CallStart(0, "a", "f"), CallArguments(0, "{}"), Content("\n"), CallStart(1, "b", "g"),
        CallArguments(1, "{}"), Content("\n\n"),
    ]  # fmt: skip
    events, _ = streamed(deltas, "tool_calls")
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["function_call", "function_call"]


def test_white_space_before_words_is_theirs() -> None:
    events, _ = streamed([Reasoning("hm"), Content(" \n"), Content("So.")], "stop")
    assert [item["content"][0]["text"] for item in events[-1]["response"]["output"]] == ["hm", " \nSo."]


def test_a_reply_without_a_word_is_an_empty_message() -> None:
    events, _ = streamed([], "stop")
    (item,) = events[-1]["response"]["output"]
    assert (item["type"], item["content"][0]["text"]) == ("message", "")


def test_only_the_last_item_of_a_cut_reply_is_incomplete() -> None:
    events, _ = streamed([Reasoning("a"), Content("b")], "length")
    assert [item["status"] for item in events[-1]["response"]["output"]] == ["completed", "incomplete"]


def test_a_broken_stream_ends_with_what_there_is_and_why() -> None:
    kept: list[dict[str, Any]] = []
    shape = ResponsesShape(BEGUN, keep=kept.append)
    body = shape.opening(0) + shape.deltas(0, [Content("half")], None) + shape.failed(ServerLost("it is gone"))
    failed = events_of(body)[-1]
    OPENAI_EVENT.validate_python(failed)
    assert failed["response"]["error"]["message"] == "it is gone"
    assert failed["response"]["output"][0]["content"][0]["text"] == "half"
    assert kept == []


def test_logprobs_are_the_message_s_also_those_of_tokens_whose_text_came_later() -> None:
    one, two, three = ({"token": name, "logprob": -1.0, "bytes": [1], "top_logprobs": []} for name in "abc")
    shape = ResponsesShape(BEGUN, keep=lambda ended: None)
    body = shape.opening(0) + shape.deltas(0, [], {"logprobs": {"content": [one]}})
    body += shape.deltas(0, [Content("ab")], {"logprobs": {"content": [two]}})
    body += shape.deltas(0, [], {"logprobs": {"content": [three]}}) + shape.finish(0, "stop") + shape.usage(USAGE)
    events = events_of(body)
    (delta,) = (event for event in events if event["type"] == "response.output_text.delta")
    assert delta["logprobs"] == [one, two]
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == [one, two, three]
