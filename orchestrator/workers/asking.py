"""Answers that are about all workers: each asks the others over their private sockets, and adds its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import orjson

from disaggregated import logs
from disaggregated.errors import DisaggregatedError
from orchestrator.response_store import StoredResponse
from orchestrator.workers.merge import merged
from orchestrator.workers.private_calls import NoAnswer, ask

log = logs.get(__name__)

T = TypeVar("T")


class AskedSiblings:
    """`Siblings` behind Unix sockets. One that does not answer is left out, and said to be."""

    def __init__(self, index: int, sockets: Sequence[Path]) -> None:
        self._index = index
        self._sockets = sockets

    async def metrics(self, own: bytes) -> bytes:
        others = await self._each(lambda socket: ask(socket, "GET", "/metrics"))
        return await asyncio.to_thread(merged, [own, *(each for each in others if each is not None)])

    async def story(self, request_id: str) -> bytes | None:
        path = f"/requests/{quote(request_id)}"
        found = await self._each(lambda socket: ask(socket, "GET", path))
        return next((each for each in found if each is not None), None)

    async def response(self, response_id: str, *, tenant: str, forget: bool = False) -> StoredResponse | None:
        method, path = "DELETE" if forget else "GET", f"/responses/{quote(response_id)}?tenant={quote(tenant, safe='')}"
        found = await self._each(lambda socket: ask(socket, method, path))
        return next((StoredResponse.from_json(each) for each in found if each is not None), None)

    async def counts(self, own: Mapping[str, int]) -> dict[str, Any]:
        answers = await self._each(lambda socket: ask(socket, "GET", "/counts"))
        names = [f"worker-{self._index}", *(socket.name for socket in self._sockets)]
        counts = [dict(own), *(None if each is None else orjson.loads(each) for each in answers)]
        total = {name: sum(each[name] for each in counts if each is not None) for name in own}
        return {**total, "workers": dict(sorted(zip(names, counts, strict=True)))}

    async def _each(self, call: Callable[[Path], Awaitable[T]]) -> list[T | None]:
        async def one(socket: Path) -> T | None:
            try:
                return await call(socket)
            except NoAnswer as error:
                log.warning("worker_not_answering", worker=socket.name, error=str(error))
            except DisaggregatedError:  # It answers, and has nothing to say to this.
                pass
            return None

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(socket)) for socket in self._sockets]
        return [task.result() for task in tasks]
