"""Whatever an HTTP server wrote to one connection, taken apart again."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import orjson


@dataclasses.dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    """By their names in lower case."""
    body: bytes

    @property
    def gist(self) -> tuple[int, str, Any]:
        """What has to be the same whenever the same is asked: no times, no ids, no borders between events."""
        kind = self.headers.get("content-type", "")
        return self.status, kind, _streamed(self.body) if kind == "text/event-stream" else _without_times(self.body)


def answers_in(received: bytes) -> list[Answer]:
    """But for those that only say to go on. Raises AssertionError where `received` is not a row of whole answers."""
    answers = []
    while received:
        head, end, received = received.partition(b"\r\n\r\n")
        assert end, f"half a head: {head!r}"
        first, *lines = head.decode().split("\r\n")
        if first == "HTTP/1.1 100 Continue":
            continue
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        if "content-length" in headers:
            length = int(headers["content-length"])
            assert len(received) >= length, f"half a body: {received!r}"
            body, received = received[:length], received[length:]
        else:
            assert headers.get("transfer-encoding") == "chunked", headers
            body, received = _chunks(received)
        answers.append(Answer(int(first.split()[1]), headers, body))
    return answers


def _chunks(received: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        line, _, received = received.partition(b"\r\n")
        size = int(line, 16)
        assert received[size : size + 2] == b"\r\n", "a chunk is cut short"
        body, received = body + received[:size], received[size + 2 :]
        if not size:
            return body, received


def _without_times(body: bytes) -> Any:
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body
    if "id" in fields:
        del fields["id"], fields["created"]
    return fields


def _streamed(body: bytes) -> tuple[list[tuple[int, str, str]], bool]:
    """The text of each choice and what ended it, and whether the stream ends as it should."""
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for line in re.findall(rb"data: (\{.*\})\n\n", body):
        for choice in orjson.loads(line).get("choices", []):
            index = choice["index"]
            text = choice.get("text") or choice.get("delta", {}).get("content") or ""
            texts[index] = texts.get(index, "") + text
            reasons[index] = choice["finish_reason"] or ""
    return [(index, texts[index], reasons[index]) for index in sorted(texts)], body.endswith(b"data: [DONE]\n\n")
