"""Mock context and generation servers that speak the HTTP which the routers of the field expect of theirs.

    python -m benchmarks.router.mock_http

A prefill is answered at once; a decode gets its tokens at the step rate, as events or as one body at its end. The
server is one asyncio protocol: what it costs is a system call each way.
"""

from __future__ import annotations

import asyncio
from typing import Final, cast

import orjson
import uvloop

from benchmarks.router.mock_control import Control, until_told

CREATED: Final = 1_760_000_000
_JSON: Final = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
_STREAM: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_EVENT: Final = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":%d,"model":"mock","choices":[{"index":0,'
    b'"delta":{"content":" %%d"},"logprobs":null,"finish_reason":null}]}\n\n' % CREATED
)
_LAST: Final = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":%d,"model":"mock","choices":[{"index":0,'
    b'"delta":{},"logprobs":null,"finish_reason":"length"}]}\n\ndata: [DONE]\n\n' % CREATED
)
_PREFILLED: Final = orjson.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": CREATED,
        "model": "mock",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": " 1"}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 8, "completion_tokens": 1, "total_tokens": 9},
        "kv_transfer_params": {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": "mock",
            "remote_block_ids": [1],
            "remote_host": "127.0.0.1",
            "remote_port": 1,
        },
    }
)


class Sequence:
    """One decode on its connection."""

    def __init__(self, num_left: int, *, is_streamed: bool) -> None:
        self.num_left = num_left
        self.is_streamed = is_streamed
        self.token_ids: list[int] = []


class Connection(asyncio.Protocol):
    def __init__(self, server: MockServer) -> None:
        self._server = server
        self._received = b""
        self._takes_more = True
        self.sequence: Sequence | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so.

    def pause_writing(self) -> None:
        self._takes_more = False

    def resume_writing(self) -> None:
        self._takes_more = True

    def connection_lost(self, error: Exception | None) -> None:
        if self.sequence is not None:
            self._server.running.discard(self)
            self._server.control.cancelled()

    def data_received(self, received: bytes) -> None:
        self._received += received
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            head = self._received[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._received) < end + 4 + length:
                return
            body = self._received[end + 4 : end + 4 + length]
            self._received = self._received[end + 4 + length :]
            self._requested(head, body)

    def _requested(self, head: bytes, body: bytes) -> None:
        if not head.startswith(b"post") or not body:
            self._answer(b'{"status":"ok","model_path":"mock","data":[{"id":"mock"}]}')
            return
        asked = orjson.loads(body)
        if not self._server.decodes:
            self._answer(_PREFILLED)
            return
        self.sequence = Sequence(asked.get("max_tokens") or asked["max_completion_tokens"], is_streamed=asked["stream"])
        self._server.running.add(self)
        if self.sequence.is_streamed:
            self._transport.write(_STREAM)
            self.step(1)

    def _answer(self, body: bytes) -> None:
        self._transport.write(_JSON % (len(body), body))

    def step(self, num_tokens: int) -> None:
        assert self.sequence is not None
        if not self._takes_more:
            return  # As a server with back pressure: this sequence waits.
        sequence = self.sequence
        tokens = [self._server.control.next_token() for _ in range(min(num_tokens, sequence.num_left))]
        sequence.num_left -= len(tokens)
        if sequence.is_streamed:
            events = b"".join(_EVENT % token for token in tokens) + (b"" if sequence.num_left else _LAST)
            self._transport.write(
                b"%x\r\n%b\r\n" % (len(events), events) + (b"" if sequence.num_left else b"0\r\n\r\n")
            )
        sequence.token_ids += tokens
        if not sequence.num_left:
            self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        self._server.running.discard(self)
        self.sequence = None
        if not sequence.is_streamed:
            text = " ".join(map(str, sequence.token_ids))
            answer = orjson.loads(_PREFILLED)
            answer["choices"][0]["message"]["content"] = text
            self._answer(orjson.dumps(answer))


class MockServer:
    def __init__(self, control: Control, *, decodes: bool) -> None:
        self.control = control
        self.decodes = decodes
        self.running: set[Connection] = set()

    async def listen(self) -> int:
        """The port that was taken; until `close()`."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(lambda: Connection(self), "127.0.0.1", 0, backlog=4096)
        return int(self._listener.sockets[0].getsockname()[1])

    def close(self) -> None:
        self._listener.close()

    def step(self, num_tokens: int) -> None:
        for connection in list(self.running):
            connection.step(num_tokens)


async def main() -> None:
    control = Control()
    servers = [MockServer(control, decodes=decodes) for decodes in (False, False, True, True)]
    ports = [await server.listen() for server in servers]
    await until_told(control, ports, list(servers))


if __name__ == "__main__":
    uvloop.run(main())
