"""aiohttp's reader of HTTP, for every connection that is not ours alone: its refusals in the shape that clients expect.

Bodies stay as they came: whoever reads one unpacks it, within its limit and on a thread.
"""

from __future__ import annotations

import asyncio

from aiohttp import web
from aiohttp.web_protocol import _ErrInfo

from disaggregated import logs
from orchestrator.api.error_body import first_words, json_response, plain_error_response, plain_fields

log = logs.get(__name__)


class OtherReader(web.RequestHandler):
    """Of one connection."""

    __slots__ = ()

    def __init__(self, server: web.Server, *, keepalive_s: float) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]
            keepalive_timeout=keepalive_s,
            auto_decompress=False,
        )

    def data_received(self, data: bytes) -> None:
        """Whoever reads a body whose rest is no HTTP, or is about to, is told: aiohttp would let it wait for more.

        Looks at two private fields of aiohttp's class, as a test sees.
        """
        super().data_received(data)
        if not self._messages or not isinstance(wrong := self._messages[-1][0], _ErrInfo):
            return
        under_way = self._current_request
        body = self._messages[-2][1] if len(self._messages) > 1 else under_way and under_way.content
        if body and not body.is_eof():
            self._messages.pop()
            body.set_exception(web.RequestPayloadError(wrong.message))
            body.feed_eof()
            self.close()  # Once that is answered.

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What cannot be read as HTTP; whatever goes wrong later is answered by the application.

        Raises:
            ConnectionError: something else has been answered already.
        """
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun, and there cannot be another one")
        if status >= 500:
            if exc is not None:
                log.traceback("handler_crashed", exc)
            answer = json_response(plain_fields("internal error", kind="internal_error"), status=500)
        else:
            answer = plain_error_response(f"this is no valid HTTP: {first_words(message or '')}", status=status)
        answer.force_close()
        return answer
