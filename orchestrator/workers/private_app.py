"""What a worker answers to its supervisor and its siblings, on a socket that only their user can reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from disaggregated.errors import DisaggregatedError
from orchestrator.api.error_body import error_response, json_response, plain_error_response
from orchestrator.api.operations import own_counts
from orchestrator.front_door import FrontDoor
from orchestrator.metrics import CONTENT_TYPE
from orchestrator.workers.private_calls import ask

Roll = list[tuple[str, str]]
"""(role, address) of every server that the launcher runs."""


class RemoteScaler:
    """`Scaler` of a worker: the launcher is its supervisor's, and tells of its processes when they change."""

    def __init__(self, supervisor: Path, *, timeout_s: float) -> None:
        self._supervisor = supervisor
        self._timeout_s = timeout_s
        self.processes: Sequence[Mapping[str, object]] = ()

    async def scale(self, role: str, count: int) -> None:
        await ask(self._supervisor, "POST", "/scale", {"role": role, "count": count}, timeout_s=self._timeout_s)

    def describe(self) -> Sequence[Mapping[str, object]]:
        return self.processes


class PrivateApp:
    def __init__(self, door: FrontDoor, scaler: RemoteScaler) -> None:
        self._door = door
        self._scaler = scaler
        self._enrolled: set[tuple[str, str]] = set()
        """Servers that the supervisor told of; those of the file's `urls` are not among them."""

    def make(self) -> web.Application:
        app = web.Application(middlewares=[errors_answered])
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/counts", self._counts)
        app.router.add_get("/requests/{request_id:.+}", self._story)
        app.router.add_get("/responses/{response_id}", self._response)
        app.router.add_delete("/responses/{response_id}", self._response)
        app.router.add_put("/servers", self._servers)
        app.router.add_post("/drain", self._drain)
        return app

    async def _metrics(self, http: web.Request) -> web.Response:
        return web.Response(body=self._door.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def _counts(self, http: web.Request) -> web.Response:
        return json_response(own_counts(self._door))

    async def _story(self, http: web.Request) -> web.Response:
        story = self._door.dispatcher.stories.find(http.match_info["request_id"])
        if story is None:
            return plain_error_response("not here", status=404)
        return json_response(story.as_json(now_s=self._door.clock()))

    async def _response(self, http: web.Request) -> web.Response:
        """One that is kept here, and with DELETE no longer."""
        response_id, tenant = http.match_info["response_id"], http.query["tenant"]
        stored = self._door.responses.get(response_id, tenant=tenant)
        if stored is None:
            return plain_error_response("not here", status=404)
        if http.method == "DELETE":
            self._door.responses.discard(response_id, tenant=tenant)
        return web.Response(body=stored.to_json(), content_type="application/json")

    async def _servers(self, http: web.Request) -> web.Response:
        """All that there are now, and the processes behind them."""
        body = await http.json()
        roll = {(role, address) for role, address in body["servers"]}
        self._scaler.processes = body["processes"]
        for role, address in roll - self._enrolled:
            self._door.pools.add(role, address)
        for role, address in self._enrolled - roll:
            await self._door.pools.remove(role, address)
        self._enrolled = roll
        return json_response({})

    async def _drain(self, http: web.Request) -> web.Response:
        body: dict[str, Any] = await http.json()
        num_left = await self._door.pools.drain(body["role"], body["address"], deadline_s=body["deadline_s"])
        return json_response({"num_left": num_left})


@web.middleware
async def errors_answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except DisaggregatedError as error:
        return error_response(error, retry_after_s=1)
