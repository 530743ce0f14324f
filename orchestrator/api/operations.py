"""What operators and their tools ask: health, metrics, who is there, what happened to a request, who holds what."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from aiohttp import web

from disaggregated import __version__
from disaggregated.errors import DisaggregatedError, InvalidRequest, NoServerAvailable
from disaggregated.v1 import control_pb2
from orchestrator.admission.make import caller_of
from orchestrator.api.bodies import received_body
from orchestrator.api.error_body import error_response, json_response, plain_error_response
from orchestrator.api.fields import Fields, shown
from orchestrator.front_door import FrontDoor
from orchestrator.metrics import CONTENT_TYPE
from orchestrator.server import Role, Server

LEDGER_TIMEOUT_S: Final = 15.0
"""A server whose engine is in a long step says so after ten."""
_INSTANCES_MAX: Final = 10_000


async def models(door: FrontDoor, http: web.Request) -> web.Response:
    model = door.served_model()
    may_use = caller_of(http).may_use(model.name, *model.aliases)
    entry = {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "disaggregated",
        "max_model_len": door.num_tokens_max(model),
    }
    return json_response({"object": "list", "data": [entry] if may_use else []})


async def health(door: FrontDoor, http: web.Request) -> web.Response:
    reason = door.why_not_serving()
    if reason is None:
        unhealthy = {server.instance_id: server.unhealthy for server in door.pools if server.unhealthy}
        workers = (await door.siblings.counts(own_counts(door))).get("workers", {})
        unhealthy |= {name: "does not answer" for name, counts in workers.items() if counts is None}
        return json_response({"status": "serving", **({"unhealthy": unhealthy} if unhealthy else {})})
    return error_response(NoServerAvailable(reason), retry_after_s=1)


async def metrics(door: FrontDoor, http: web.Request) -> web.Response:
    body = await door.siblings.metrics(door.metrics.render())
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})


async def version(door: FrontDoor, http: web.Request) -> web.Response:
    return json_response({"version": __version__})


async def cluster_info(door: FrontDoor, http: web.Request) -> web.Response:
    answer: dict[str, Any] = {
        "is_ready": door.why_not_serving() is None,
        "current_workers": {
            f"{role.value}_servers": [describe_worker(server) for server in door.pools.of(role)] for role in Role
        },
        **await door.siblings.counts(own_counts(door)),
    }
    if door.scaler is not None:
        answer["processes"] = list(door.scaler.describe())
    return json_response(answer)


def own_counts(door: FrontDoor) -> dict[str, int]:
    """What this process has itself, besides its siblings."""
    dispatcher = door.dispatcher
    shares = sum(len(server.shares) for server in door.pools)
    return {"queue_depth": len(dispatcher.queue), "running": dispatcher.stories.num_running, "shares": shares}


def describe_worker(server: Server) -> dict[str, Any]:
    host, _, port = server.address.rpartition(":")
    known: dict[str, Any] = {
        "worker_id": server.instance_id,
        "host": host,
        "port": int(port) if port.isdigit() else port,
        "role": server.role.value,
        "standing": server.standing.value,
        "reason": server.reason,
        "unhealthy": server.unhealthy,
        "times_lost": server.num_times_lost,
        "requests": len(server.shares),
        "requests_elsewhere": server.elsewhere.num_requests,
    }
    if server.client is not None:
        known |= {
            "model": server.description.model,
            "device": server.description.device,
            "dtype": server.description.dtype,
            "pid": server.description.pid,
            "blocks": server.heartbeat.num_blocks,
            "blocks_free": server.heartbeat.num_blocks_free,
            "blocks_known": len(server.known_blocks),
            "transports": list(server.description.transports),
            "links": [_link(link) for link in server.heartbeat.links],
        }
    return known


def _link(link: control_pb2.LinkStatistics) -> dict[str, Any]:
    """`peer` is empty where blocks were read from this server: a source counts its readers together."""
    return {
        "peer": link.peer_id,
        "transport": link.transport,
        "devices": link.devices,
        "why": link.why,
        "fallbacks": link.fallbacks,
        "transfers": link.transfers_total,
        "failures": link.failures_total,
        "bytes": link.bytes_total,
        "bytes_per_s": link.recent_bytes_per_s,
    }


async def scale(door: FrontDoor, http: web.Request) -> web.Response:
    """`{"generation": 2}`. Answers once it is so, which takes as long as a server takes to load its model."""
    if door.scaler is None:
        raise InvalidRequest("the servers of this deployment are run by somebody else; start or stop them there")
    body = Fields.parse(await received_body(http))
    if not body.values:
        raise InvalidRequest('name a role and a count, such as {"generation": 2}')
    for role in body.values:
        if role not in {known.value for known in Role}:
            raise InvalidRequest(f"there is no role {shown(role)}; the roles are context and generation", param=role)
    counts = {role: body.integer(role, low=0, high=_INSTANCES_MAX) or 0 for role in body.values}
    for role, count in counts.items():
        await door.scaler.scale(role, count)
    return json_response(counts)


async def request_story(door: FrontDoor, http: web.Request) -> web.Response:
    request_id = http.match_info["request_id"]
    stories = door.dispatcher.stories
    if (story := stories.find(request_id)) is not None:
        return json_response(story.as_json(now_s=door.clock()))
    parts: list[dict[str, Any]] = []
    while (part := stories.find(f"{request_id}.{len(parts)}")) is not None:
        parts.append(part.as_json(now_s=door.clock()))
    if parts:
        return json_response({"request_id": request_id, "sequences": parts})
    if (theirs := await door.siblings.story(request_id)) is not None:
        return web.Response(body=theirs, content_type="application/json")
    kept = door.config.perf_metrics_max_requests
    return plain_error_response(
        f"no story of {request_id!r}: the last {kept} requests are kept (perf_metrics_max_requests)", status=404
    )


async def ledger(door: FrontDoor, http: web.Request) -> web.Response:
    """Every block, lease and transfer of every server, with its owner."""
    servers = list(door.pools)
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(_ledger_of(server)) for server in servers]
    counts = await door.siblings.counts(own_counts(door))
    return json_response({"queued": counts["queue_depth"], **counts, "servers": [task.result() for task in asked]})


async def _ledger_of(server: Server) -> dict[str, Any]:
    answer: dict[str, Any] = {"instance": server.instance_id, "role": server.role.value, "entries": []}
    if server.client is None:
        return {**answer, "error": server.reason}
    try:
        entries = await server.client.ledger(timeout_s=LEDGER_TIMEOUT_S)
    except DisaggregatedError as error:
        return {**answer, "error": str(error)}
    answer["entries"] = [
        {"kind": entry.kind, "owner": entry.owner, "count": entry.count, "age_s": entry.age_s} for entry in entries
    ]
    return answer
