"""The worker processes: started, told which servers there are, started again when they die, stopped together."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import orjson

from disaggregated import logs
from disaggregated.errors import DisaggregatedError
from orchestrator.launcher import start_failure
from orchestrator.server_child import ServerChild
from orchestrator.workers.orders import Orders
from orchestrator.workers.private_calls import NoAnswer, ask

log = logs.get(__name__)

READY: Final = "READY worker "
MODULE: Final = "orchestrator.workers.worker"
BACKOFF_S_MIN: Final = 0.2
BACKOFF_S_MAX: Final = 10.0
STOP_TIMEOUT_S: Final = 4.0
"""For a worker to end its requests after SIGTERM, before it is killed."""
_TOLD_AGAIN_S: Final = 1.0


class Crew:
    """Owns every worker process. Implements `launcher.Pools`: what the launcher does to servers, all workers do."""

    def __init__(
        self,
        orders: Sequence[Orders],
        environ: Mapping[str, str],
        *,
        module: str = MODULE,
        show: Callable[[str], object] = lambda line: sys.stderr.write(f"{line}\n"),
    ) -> None:
        self._orders = orders
        self._environ = environ
        self._module = module
        self._show = show
        self._children: dict[int, ServerChild] = {}
        self._ready: set[int] = set()
        self._has_been_ready = False
        self._changed = asyncio.Condition()
        self._news = [asyncio.Event() for _ in orders]
        self._roll: list[tuple[str, str]] = []
        self.describe: Callable[[], Sequence[Mapping[str, object]]] = lambda: ()
        """The launcher's processes, for the workers' answers."""

    async def run(self) -> None:
        """Until cancelled; then all workers are stopped. Raises StartupError when the first ones cannot start."""
        try:
            async with asyncio.TaskGroup() as group:
                for orders in self._orders:
                    group.create_task(self._keep(orders), name=f"worker {orders.index}")
                    group.create_task(self._tell(orders), name=f"tell worker {orders.index}")
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures

    async def wait_ready(self) -> None:
        """Every worker answers at the port."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._ready) == len(self._orders))

    def kill_all(self) -> None:
        for child in self._children.values():
            child.kill()

    # One worker.

    async def _keep(self, orders: Orders) -> None:
        backoff_s = BACKOFF_S_MIN
        while True:
            was_ready = await self._live_and_die(orders)
            backoff_s = BACKOFF_S_MIN if was_ready else min(2 * backoff_s, BACKOFF_S_MAX)
            await asyncio.sleep(backoff_s)

    async def _live_and_die(self, orders: Orders) -> bool:
        """One process of it, from start to exit; whether it ever was ready."""
        name = f"worker-{orders.index}"
        child = await ServerChild.spawn(
            name, ["-m", self._module], self._environ, told=orders.to_bytes(), pass_fds=(orders.levels_fd,)
        )
        self._children[orders.index] = child
        was_ready = False
        try:
            while (line := await child.next_line()) is not None:
                if line.startswith(READY):
                    was_ready = self._has_been_ready = True
                    await self._is_ready(orders.index)
                else:
                    self._show(f"{name} | {line}")
            code = await child.wait()
        finally:
            self._ready.discard(orders.index)
            await child.stop(timeout_s=STOP_TIMEOUT_S)
        log.error("worker_exited", worker=name, code=code)
        if not was_ready and not self._has_been_ready:
            words = child.last_words[-1] if child.last_words else "it said nothing"
            raise start_failure(f"exit code {code}", words)
        return was_ready

    async def _is_ready(self, index: int) -> None:
        self._ready.add(index)
        self._news[index].set()
        async with self._changed:
            self._changed.notify_all()

    async def _tell(self, orders: Orders) -> None:
        """Which servers there are, whenever that has changed, and again while the worker does not answer."""
        news, socket = self._news[orders.index], orders.socket_of(orders.index)
        while True:
            await news.wait()
            news.clear()
            if orders.index not in self._ready:
                continue
            try:
                await ask(socket, "PUT", "/servers", {"servers": self._roll, "processes": list(self.describe())})
            except NoAnswer as error:
                log.warning("worker_not_told", worker=socket.name, error=str(error))
                asyncio.get_running_loop().call_later(_TOLD_AGAIN_S, news.set)

    # What the launcher does to servers.

    def changed(self) -> None:
        """The launcher's processes are not what they were."""
        for news in self._news:
            news.set()

    def add(self, role: str, address: str) -> None:
        self._roll = [*self._roll, (role, address)]
        self.changed()

    async def remove(self, role: str, address: str) -> None:
        self._roll = [entry for entry in self._roll if entry != (role, address)]
        self.changed()

    async def drain(self, role: str, address: str, *, deadline_s: float) -> int:
        """The server itself counts what is left there; the workers each tell it to take no more."""
        body = {"role": role, "address": address, "deadline_s": deadline_s}
        ready = [orders for orders in self._orders if orders.index in self._ready]

        async def one(orders: Orders) -> int:
            socket = orders.socket_of(orders.index)
            try:
                answer: dict[str, Any] = orjson.loads(
                    await ask(socket, "POST", "/drain", body, timeout_s=deadline_s + 10.0)
                )
            except DisaggregatedError as error:
                log.warning("worker_not_draining", worker=socket.name, error=str(error))
                return 0
            return int(answer["num_left"])

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(orders)) for orders in ready]
        return max((task.result() for task in tasks), default=0)


def orders_of(first: Orders) -> list[Orders]:
    """The same for every worker, each with its own index."""
    return [dataclasses.replace(first, index=index) for index in range(first.config.door.num_workers)]
