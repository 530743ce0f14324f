"""Runs the servers of a deployment as local processes: starts them, restarts crashed ones, scales, stops them all.

What to do is decided by `LaunchPlan`; here is only the doing. One loop takes events (a ready line, an exit, a drained
server, a call of `scale`) and carries out the decisions; one task a process reads its output and reports.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Final, Protocol

import psutil

from disaggregated import logs
from disaggregated.config.deployment import DeploymentConfig, PoolConfig
from disaggregated.config.server import ServerConfig
from disaggregated.cores import available_cores
from disaggregated.errors import DisaggregatedError, InvalidRequest, StartupError
from disaggregated.security import membership
from orchestrator.core_allocation import CoreAllocation
from orchestrator.hung_server import until_hung
from orchestrator.launch_plan import (
    Decision,
    Drain,
    Instance,
    Join,
    Kill,
    LaunchLimits,
    LaunchPlan,
    Leave,
    Phase,
    Start,
    Terminate,
)
from orchestrator.memory_room import why_no_room
from orchestrator.server_child import MODULES, READY_LINE, ServerChild
from orchestrator.server_client import Connect, WireServerClient

log = logs.get(__name__)

_EVENTS_MAX: Final = 1024
"""Events not handled yet. Whoever reports one more waits, which loses nothing."""
CRASHES_MAX: Final = 3
"""In a row; whoever waits for a server that crashes more often is told. It is started again all the same."""
INSTANCES_MAX: Final = 256
"""More servers on one machine is a slip of the keyboard."""

Event = Callable[[float], Iterable[Decision]]
"""Tells the plan what happened, given the time, and gives its decisions."""


class Pools(Protocol):
    """The part of ServerPools that a launcher acts on."""

    def add(self, role: str, address: str) -> None: ...
    async def drain(self, role: str, address: str, *, deadline_s: float) -> int: ...
    async def remove(self, role: str, address: str) -> None: ...


class Launcher:
    """Owns every local server process. Nothing it started outlives `run()`."""

    def __init__(
        self,
        config: DeploymentConfig,
        pools: Pools,
        *,
        limits: LaunchLimits | None = None,
        environ: Mapping[str, str] = os.environ,
        modules: Mapping[str, str] = MODULES,
        connect: Connect = WireServerClient,
        show: Callable[[str], object] = lambda line: sys.stderr.write(f"{line}\n"),
    ) -> None:
        self._pools = pools
        self._configs = {"context": config.context, "generation": config.generation}
        self._environ = {**environ, **membership.of_this_process().secret.for_child()}
        self._modules = modules
        self._connect = connect
        self._show = show
        self.plan = LaunchPlan(limits or limits_of(config))
        num_servers = sum(pool.num_instances for pool in self._local_pools().values())
        self._cores = CoreAllocation(available_cores(), num_servers=num_servers)
        self._events: asyncio.Queue[Event] = asyncio.Queue(_EVENTS_MAX)
        self._changed = asyncio.Condition()
        self._children: dict[str, ServerChild] = {}
        self._last_words: dict[str, str] = {}
        self._has_been_ready = False
        for role, pool in self._local_pools().items():
            self._events.put_nowait(partial(self._on_scale, role, pool.num_instances))

    @property
    def has_work(self) -> bool:
        """Some pool of the deployment is made of local processes."""
        return bool(self._local_pools())

    async def run(self, stop: asyncio.Event) -> None:
        """Starts the deployment's servers and keeps them as wanted until `stop` is set; then stops them all.

        Raises StartupError when the deployment cannot start; its servers are gone by then.
        """
        try:
            async with asyncio.TaskGroup() as group:
                stopping = group.create_task(self._report_stop(stop))
                await self._loop(group, stopping)
        except ExceptionGroup as group_error:
            raise group_error.exceptions[0] from group_error
        finally:
            self.kill_all()

    async def scale(self, role: str, count: int) -> None:
        """Returns when exactly `count` servers of the role are ready, and those let go are drained and gone.

        Raises InvalidRequest for a role or count that cannot be, DisaggregatedError when a new server cannot start.
        """
        self._check_may_scale(role, count)
        is_heard = asyncio.Event()

        def event(now_s: float) -> list[Decision]:
            is_heard.set()
            return self.plan.scale(role, count, now_s=now_s)

        await self._events.put(event)
        limits = self.plan.limits
        try:
            async with asyncio.timeout(limits.start_timeout_s + limits.drain_timeout_s + 2 * limits.stop_timeout_s):
                await self.wait_until(lambda: is_heard.is_set() and self._scale_is_over(role, count))
        except TimeoutError as error:
            raise DisaggregatedError(f"{role}: not {count} servers yet; it goes on, see /cluster_info") from error
        if (troubled := self._troubled(role)) is not None:
            words = self._last_words.get(troubled.name, "it said nothing")
            raise DisaggregatedError(f"{troubled.name} cannot start: {troubled.last_exit}: {words}")
        if self.plan.wanted(role) != count:
            raise DisaggregatedError(f"{role}: {self.plan.wanted(role)} servers are wanted by now, no longer {count}")

    def _check_may_scale(self, role: str, count: int) -> None:
        if role not in self._configs:
            raise InvalidRequest(f"there is no role {role}; the roles are context and generation", param="role")
        if role not in self._local_pools():
            raise InvalidRequest(f"the {role} servers have urls and are run by somebody else", param=role)
        lowest = 1 if role == "generation" else 0
        if not lowest <= count <= INSTANCES_MAX:
            raise InvalidRequest(f"{role}: must be between {lowest} and {INSTANCES_MAX}, is {count}", param=role)
        num_new, available_bytes = count - self.plan.wanted(role), psutil.virtual_memory().available
        if reason := why_no_room(role, num_new, self._configs[role].server, available_bytes=available_bytes):
            raise InvalidRequest(reason, param=role)

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Looks after every event; the caller sets the deadline."""
        async with self._changed:
            await self._changed.wait_for(condition)

    def describe(self) -> Sequence[Mapping[str, object]]:
        """Every local server as an operator wants to see it."""
        now_s = time.monotonic()
        return [
            {
                "name": instance.name,
                "role": instance.role,
                "phase": str(instance.phase),
                "phase_s": round(now_s - instance.since_s, 3),
                "address": instance.address,
                "pid": self._children[instance.name].pid if instance.name in self._children else None,
                "restarts": instance.restarts,
                "failures_in_a_row": instance.failures_in_a_row,
                "last_exit": instance.last_exit,
            }
            for instance in self.plan.instances.values()
        ]

    def kill_all(self) -> None:
        for child in self._children.values():
            child.kill()

    def _local_pools(self) -> dict[str, PoolConfig]:
        return {role: pool for role, pool in self._configs.items() if not pool.urls}

    def _scale_is_over(self, role: str, count: int) -> bool:
        return self._troubled(role) is not None or self.plan.wanted(role) != count or self.plan.is_settled(role)

    def _troubled(self, role: str) -> Instance | None:
        """An instance that is wanted and does not start, or crashes at every start."""
        for instance in self.plan.instances.values():
            is_leaving = instance.phase in (Phase.DRAINING, Phase.STOPPING)
            is_hopeless = instance.phase is Phase.FAILED or instance.failures_in_a_row >= CRASHES_MAX
            if instance.role == role and is_hopeless and not is_leaving:
                return instance
        return None

    async def _report_stop(self, stop: asyncio.Event) -> None:
        await stop.wait()
        await self._events.put(lambda now_s: self.plan.stop_all(now_s=now_s))

    async def _loop(self, group: asyncio.TaskGroup, stopping: asyncio.Task[None]) -> None:
        while not (stopping.done() and self._events.empty() and not self.plan.instances):
            deadline_s = self.plan.next_deadline_s()
            timeout_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            decisions: list[Decision] = []
            try:
                async with asyncio.timeout(timeout_s):
                    event = await self._events.get()
                decisions += event(time.monotonic())
            except TimeoutError:
                decisions += self.plan.wake(now_s=time.monotonic())
            self._carry_out(decisions, group)
            self._check_start()
            async with self._changed:
                self._changed.notify_all()

    def _check_start(self) -> None:
        """A deployment whose first servers cannot start ends; one that has served goes on with what it has."""
        instances = self.plan.instances.values()
        self._has_been_ready = self._has_been_ready or any(i.phase is Phase.READY for i in instances)
        failed = [i for i in instances if i.phase is Phase.FAILED]
        if failed and not self._has_been_ready:
            raise start_failure(failed[0].last_exit, self._last_words.get(failed[0].name, "it said nothing"))

    def _carry_out(self, decisions: Iterable[Decision], group: asyncio.TaskGroup) -> None:
        for decision in decisions:
            match decision:
                case Start(name, role):
                    group.create_task(self._attend(name, role, group), name=name)
                case Join(role, address):
                    self._pools.add(role, address)
                case Leave(role, address):
                    group.create_task(self._pools.remove(role, address))
                case Drain():
                    group.create_task(self._drain(decision))
                case Terminate(name) if name in self._children:
                    self._children[name].terminate()
                case Kill(name) if name in self._children:
                    self._children[name].kill()
                case Terminate() | Kill():  # Not started yet; `_attend` looks at the plan once it is.
                    pass

    async def _drain(self, drain: Drain) -> None:
        try:
            num_left = await self._pools.drain(drain.role, drain.address, deadline_s=drain.timeout_s)
        except DisaggregatedError:  # It has crashed meanwhile: its requests have gone elsewhere already.
            num_left = 0
        await self._events.put(lambda now_s: self.plan.drained(drain.name, num_left=num_left, now_s=now_s))

    async def _attend(self, name: str, role: str, group: asyncio.TaskGroup) -> None:
        """One process from start to exit."""
        guard: asyncio.Task[None] | None = None
        child = await ServerChild.start(name, self._modules[role], self._server_config(name, role), self._environ)
        self._children[name] = child
        try:
            if self.plan.instances[name].phase is not Phase.STARTING:
                child.terminate()
            log.info("server_started", name=name, pid=child.pid)
            while (line := await child.next_line()) is not None:
                self._show(f"{name} | {line}")
                if match := READY_LINE.match(line):
                    await self._events.put(partial(self._on_ready, name, match[1]))
                    guard = guard or group.create_task(self._guard(name, match[1]), name=f"guard {name}")
            code = await child.wait()
        finally:
            if guard is not None:
                guard.cancel()
            child.kill()
            await child.wait()
            del self._children[name]
            self._cores.give_back(name)
        self._last_words[name] = child.last_words[-1] if child.last_words else "it said nothing"
        log.info("server_exited", name=name, code=code)
        await self._events.put(lambda now_s: self.plan.exited(name, code, now_s=now_s))

    async def _guard(self, name: str, address: str) -> None:
        """Ends with the process, or with its death sentence."""
        if (limit_s := self.plan.limits.hung_timeout_s) == 0.0:
            return
        reason = await until_hung(self._connect, address, limit_s=limit_s)
        log.warning("server_hung", name=name, reason=reason)
        await self._events.put(lambda now_s: self.plan.hung(name, reason, now_s=now_s))

    def _on_scale(self, role: str, count: int, now_s: float) -> list[Decision]:
        return self.plan.scale(role, count, now_s=now_s)

    def _on_ready(self, name: str, address: str, now_s: float) -> list[Decision]:
        return self.plan.ready(name, address, now_s=now_s)

    def _server_config(self, name: str, role: str) -> ServerConfig:
        pool = self._configs[role]
        if not pool.spread_threads:
            return pool.server
        cores = self._cores.take(name)
        return dataclasses.replace(pool.server, num_threads=len(cores), cpu_affinity=cores)


def limits_of(config: DeploymentConfig, **others: float) -> LaunchLimits:
    return LaunchLimits(
        start_timeout_s=config.server_start_timeout_s, hung_timeout_s=config.server_hung_timeout_s, **others
    )


def start_failure(last_exit: str, last_words: str) -> StartupError:
    """The server's own message and exit code, as if the one command had failed itself."""
    for kind in StartupError.__subclasses__():
        if last_exit == f"exit code {kind.exit_code}":
            return kind(last_words)
    return StartupError(last_words)
