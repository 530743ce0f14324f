"""The two pools of servers, and the loop that keeps in touch with each server of them.

A server has one task here for as long as it is in its pool: describe, check that it agrees with the others, watch its
heartbeats, and when it is lost tell everybody and begin again. What counts is progress: a crash, a frozen process, a
half-open connection and a stuck step all show as "nothing heard", or "no step", for too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from disaggregated import logs
from disaggregated.config.deployment import DeploymentConfig
from disaggregated.errors import DisaggregatedError, InvalidRequest, ServerLost, Unauthenticated
from disaggregated.v1 import control_pb2
from orchestrator.agreement import ServedModelNames, disagreement
from orchestrator.fan_out import FanOut
from orchestrator.generation_link import GenerationLink
from orchestrator.routing.block_follower import follow_blocks
from orchestrator.routing.speed import PoolSpeed
from orchestrator.server import NOT_REACHED, Role, Server, Standing
from orchestrator.server_client import Connect, ServerClient, WireServerClient
from orchestrator.silence import SilenceAlarm
from orchestrator.task_owner import TaskOwner
from orchestrator.transfer_aborts import TransferAborts

log = logs.get(__name__)

DESCRIBE_TIMEOUT_S: Final = 2.0
BACKOFF_S_MIN: Final = 0.1
BACKOFF_S_MAX: Final = 2.0
HEARTBEATS_IN_LIMIT: Final = 4
"""Heartbeats that fit into `progress_timeout_s`: one may be late, or three, and the server is still there."""
STEP_LIMIT_FACTOR: Final = 30
"""A step may take that many times `progress_timeout_s`: on a CPU one chunk of a prompt takes seconds."""


class ServerPools:
    """Owns every connection to a server. `on_change` is called whenever there may be room where there was none.

    Invariant: a server is in exactly one pool, and has a task as long as it is there and the pools are open.
    """

    def __init__(
        self,
        config: DeploymentConfig,
        *,
        connect: Connect = WireServerClient,
        clock: Callable[[], float] = time.monotonic,
        on_crash: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.model: ServedModelNames | None = None
        """What servers must serve; None while the orchestrator has not loaded its side of it."""
        self.on_change: Callable[[], None] = lambda: None
        self._pulls_back = all(
            pool.server.cache_transceiver_config.pull_back for pool in (config.context, config.generation)
        )
        self.follows_blocks = self._pulls_back
        """Which blocks each server holds is known here, so that their beginnings can be had from there. Whoever routes
        by them sets it, before `start()`."""
        self._progress_timeout_s = config.progress_timeout_s
        self._connect = connect
        self._clock = clock
        self._fan_out = FanOut.make()
        """One for all links: they share what it knows of tokens."""
        self._servers: dict[tuple[Role, str], Server] = {}
        self._of: dict[Role, list[Server]] = {role: [] for role in Role}
        """The same, by role. What follows is kept, too, since each request asks for it."""
        self.num_tokens_max: int | None = None
        """The longest sequence that every server takes, so that it can go on anywhere; None while none is known."""
        self.block_size = 0
        """In tokens, equal on all servers; 0 while none is known."""
        self._speeds = {role: PoolSpeed() for role in Role}
        self._tasks: dict[Server, asyncio.Task[None]] = {}
        self.on_crash = on_crash or _end_process
        self._owner = TaskOwner(self.on_crash)
        self._described = asyncio.Event()
        self._link_numbers = itertools.count(1)
        # In containers two orchestrators may have one number and one pid, and would take each other's streams away.
        self._orchestrator_id = f"orchestrator-{config.node_id}-{os.getpid()}-{secrets.token_hex(4)}"
        self._is_open = False
        for role, pool in ((Role.CONTEXT, config.context), (Role.GENERATION, config.generation)):
            for url in pool.urls:
                self.add(role, url)

    # Who is there.

    def of(self, role: Role) -> Sequence[Server]:
        return self._of[role]

    def __iter__(self) -> Iterator[Server]:
        return iter(self._servers.values())

    def ready(self, role: Role) -> list[Server]:
        return [server for server in self._of[role] if server.is_ready]

    @property
    def knows_blocks(self) -> bool:
        """Of some server it is known which blocks it holds."""
        if self.follows_blocks:
            for server in self._servers.values():
                if server.known_blocks.num_blocks:
                    return True
        return False

    def _learn_limits(self) -> None:
        """Whenever a server has told what it is, or is forgotten."""
        known = [server.num_tokens_max for server in self if server.description.max_seq_len]
        self.num_tokens_max = min(known) if known else None
        self.block_size = max((server.block_size for server in self), default=0)

    async def first_model(self) -> str:
        """The name that the first server to answer gives its model."""
        await self._described.wait()
        return next(server.description.model for server in self if server.description.model)

    def add(self, role: str, address: str) -> None:
        """The server at `host:port` joins as soon as it answers; it need not be there yet. Idempotent."""
        key = (Role(role), address)
        if key not in self._servers:
            self._servers[key] = server = Server(*key, self._speeds[key[0]])
            self._of[server.role].append(server)
            server.pulls_back = self._pulls_back and server.role is Role.CONTEXT
            if self._is_open:
                self._start(server)

    async def drain(self, role: str, address: str, *, deadline_s: float) -> int:
        """No new request goes there from now on. Returns how many are left there after at most `deadline_s`."""
        server = self._find(role, address)
        if server.client is None:
            return 0
        server.standing, server.reason = Standing.DRAINING, "draining"
        try:
            return await server.client.drain(deadline_s=deadline_s)
        except ServerLost:
            return 0
        except DisaggregatedError as error:  # It lives and has not answered: what we have there is what is known.
            log.warning("drain_not_answered", instance=server.instance_id, error=str(error))
            return len(server.shares)

    async def remove(self, role: str, address: str) -> None:
        """Forget the server; what still runs there goes on elsewhere."""
        server = self._find(role, address)
        del self._servers[server.role, address]
        self._of[server.role].remove(server)
        self._learn_limits()
        if (task := self._tasks.pop(server, None)) is not None:
            task.cancel()
            await asyncio.wait([task])
        self._forget(server, ServerLost(f"{server.instance_id} was removed"))

    def _find(self, role: str, address: str) -> Server:
        try:
            return self._servers[Role(role), address]
        except (KeyError, ValueError) as error:
            raise InvalidRequest(f"there is no {role} server at {address}") from error

    # Keeping in touch.

    def start(self) -> None:
        """Begin to call servers. Needs a running event loop; `close()` must follow."""
        self._is_open = True
        for server in self:
            self._start(server)

    async def close(self) -> None:
        self._is_open = False
        await self._owner.close()
        for server in self:
            self._forget(server, ServerLost("the orchestrator is stopping"))

    def _start(self, server: Server) -> None:
        self._tasks[server] = self._owner.start(self._keep(server), name=f"keep {server.role} {server.address}")

    async def _keep(self, server: Server) -> None:
        """A task group whose child fails as it is cancelled forgets that it was: so the end is looked for as well."""
        backoff_s = BACKOFF_S_MIN
        while self._is_open and self._servers.get((server.role, server.address)) is server:
            was_ready = await self._live_and_die(server)
            backoff_s = BACKOFF_S_MIN if was_ready else min(2 * backoff_s, BACKOFF_S_MAX)
            await asyncio.sleep(backoff_s)

    async def _live_and_die(self, server: Server) -> bool:
        """One connection's life; whether it ever was ready."""
        client = self._connect(server.address)
        num_times_lost = server.num_times_lost
        try:
            await self._join(server, client)
        except DisaggregatedError as error:
            self._forget(server, error)
        finally:
            await client.close()
        return server.num_times_lost > num_times_lost

    def _forget(self, server: Server, error: DisaggregatedError) -> None:
        if server.standing in (Standing.READY, Standing.DRAINING):
            write = log.warning if self._is_open else log.debug
            write("server_lost", role=server.role, instance=server.instance_id, error=str(error))
            server.lost(error if isinstance(error, ServerLost) else ServerLost(str(error)))
            self.on_change()
        elif server.standing is not Standing.REFUSED:
            if isinstance(error, Unauthenticated) and server.reason != str(error):  # Said once; waiting mends nothing.
                log.error("server_not_of_this_cluster", role=server.role, address=server.address, reason=str(error))
            elif server.reason == NOT_REACHED:  # Said once; of one that was ready the log has that it was lost.
                log.warning("server_not_reached", role=server.role, address=server.address, reason=str(error))
            server.unreachable(str(error))

    async def _join(self, server: Server, client: ServerClient) -> None:
        """Never returns; raises when the server is lost or cannot join."""
        description = await client.describe(timeout_s=DESCRIBE_TIMEOUT_S)
        others = [other for other in self if other.standing in (Standing.READY, Standing.DRAINING)]
        if (reason := disagreement(server, description, others, model=self.model)) is not None:
            if server.reason != reason:
                log.error("server_refused", role=server.role, address=server.address, reason=reason)
            server.refused(reason)
            raise ServerLost(reason)
        server.connected(client, description)
        self._learn_limits()
        self._described.set()
        await self._stay(server, client)

    async def _stay(self, server: Server, client: ServerClient) -> None:
        """Read what it sends until it is silent for too long, or its connection breaks."""
        interval_s = self._progress_timeout_s / HEARTBEATS_IN_LIMIT
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as patience, asyncio.TaskGroup() as group:
                alarm = SilenceAlarm(
                    lambda: patience.reschedule(loop.time()),
                    limit_s=self._progress_timeout_s,
                    second_chance_s=interval_s,
                )
                if server.role is Role.GENERATION:
                    link_id = f"{self._orchestrator_id}-{next(self._link_numbers)}"
                    link = GenerationLink(client, link_id, clock=self._clock, fan_out=self._fan_out)
                    group.create_task(link.run(lambda: self._opened(server, link)))
                else:
                    server.aborts = TransferAborts(client)
                    group.create_task(server.aborts.run())
                if self.follows_blocks:
                    group.create_task(follow_blocks(client, server.known_blocks, name=server.instance_id))
                group.create_task(self._watch(server, client, alarm, interval_s=interval_s))
        except TimeoutError as error:
            raise ServerLost(f"{server.instance_id} was silent for {self._progress_timeout_s:g} s") from error
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures

    def _opened(self, server: Server, link: GenerationLink) -> None:
        server.link = link
        self._ready_if_complete(server)

    async def _watch(self, server: Server, client: ServerClient, alarm: SilenceAlarm, *, interval_s: float) -> None:
        step_limit_s = STEP_LIMIT_FACTOR * self._progress_timeout_s
        with contextlib.closing(alarm):
            async for heartbeat in client.watch(interval_s=interval_s):
                alarm.heard()
                if heartbeat.epoch != server.description.epoch:
                    raise ServerLost(f"{server.instance_id} was started again")
                if heartbeat.step_age_s > step_limit_s:
                    raise ServerLost(f"{server.instance_id} has not ended a step for {heartbeat.step_age_s:.1f} s")
                self._heard(server, heartbeat)
        raise ServerLost(f"{server.instance_id} ended its heartbeats")

    def _heard(self, server: Server, heartbeat: control_pb2.Heartbeat) -> None:
        if bool(heartbeat.unhealthy) != bool(server.unhealthy):
            write = log.warning if heartbeat.unhealthy else log.info
            event = "server_unhealthy" if heartbeat.unhealthy else "server_healthy_again"
            write(event, role=server.role, instance=server.instance_id, reason=heartbeat.unhealthy)
        server.heard(heartbeat, now_s=self._clock())
        self._ready_if_complete(server)
        self.on_change()

    def _ready_if_complete(self, server: Server) -> None:
        is_complete = server.heard_s is not None and (server.link is not None or server.role is Role.CONTEXT)
        if server.standing is Standing.CONNECTING and is_complete:
            server.ready()
            log.info("server_joined", role=server.role, instance=server.instance_id, address=server.address)
            self.on_change()


def _end_process(error: BaseException) -> None:
    """Our own mistake. Half an orchestrator would serve nobody; whoever started us starts us again."""
    log.error("orchestrator_crashed", error=repr(error))
    raise SystemExit(f"orchestrator crashed: {error!r}") from error
