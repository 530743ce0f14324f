"""One server process from its first line to its exit code.

port bound → engine loaded → READY on stdout → serving → SIGTERM or SIGINT → drained → exit 0
    │            │                                ├→ second signal: at once, exit 0
    │            │                                ├→ something does not return: by force, exit 70
    └────────────┴→ StartupError: its exit code   └→ the engine crashed: traceback, exit 70
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from disaggregated import logs, rpc
from disaggregated.config.server import ServerConfig
from disaggregated.engine.serving import afterwards
from disaggregated.engine.serving.last_resort import gone_within
from disaggregated.engine.serving.role import AllocatePool, LoadedServer, MakeRole, MemoryT, Role, ServerIdentity
from disaggregated.engine.serving.service import ServerService
from disaggregated.engine.serving.staged_pool import stage
from disaggregated.kv_layout import KVLayout
from disaggregated.security import membership
from disaggregated.v1 import control_pb2_grpc
from disaggregated.wire import WireServer

if TYPE_CHECKING:
    from disaggregated.engine.load import LoadedEngine

log = logs.get(__name__)

EXIT_CRASHED: Final = 70
DRAIN_ON_SIGNAL_S: Final = 4.0
"""Short, because whoever sends a signal waits in front of it. To wait longer, call Drain first."""
GOODBYE_S: Final = 1.0
"""For the last messages of streams to leave, once every request is done."""
CLOSE_S: Final = 15.0
"""For everything to be closed after that; more is only ever needed by something that does not return."""

ResultT = TypeVar("ResultT")


class ProcessEnd:
    """Why and how fast this process ends. Made and used on the event loop, but for `crash`."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.at_once = asyncio.Event()
        self.exit_code = 0
        self._loop = asyncio.get_running_loop()

    def listen_for_signals(self) -> None:
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(signal_number, self._signalled, signal_number)

    def _signalled(self, signal_number: int) -> None:
        log.info("signal_received", signal=signal.Signals(signal_number).name)
        if self.asked.is_set():
            self.at_once.set()
        self.asked.set()

    def crash(self, error: BaseException) -> None:
        """The engine's books can no longer be trusted: end without another message. Called from any thread."""
        log.traceback("engine_crashed", error)
        with contextlib.suppress(RuntimeError):  # The loop is closed: the process is ending already.
            self._loop.call_soon_threadsafe(self._crashed)

    def _crashed(self) -> None:
        self.exit_code = EXIT_CRASHED
        self.asked.set()
        self.at_once.set()


def run_server(config: ServerConfig, *, allocate: AllocatePool[MemoryT], make_role: MakeRole[MemoryT]) -> int:
    """Serve until told to stop; returns the exit code.

    Raises:
        StartupError: the process cannot start; whoever called it prints one line and exits with its code.
    """
    logs.configure(f"{config.role}-{os.getpid()}", level=config.log_level)
    if config.cpu_affinity:
        os.sched_setaffinity(0, config.cpu_affinity)
    ours = membership.join_as_told(secret_file=config.security.cluster_secret_file, tls=config.security.tls)
    if ours.secret.is_open:
        log.warning("cluster_secret_missing", so="every user of this machine can use this server; docs/security.md")
    return asyncio.run(_run(config, allocate, make_role))


async def _run(config: ServerConfig, allocate: AllocatePool[MemoryT], make_role: MakeRole[MemoryT]) -> int:
    started_s = time.monotonic()
    end = ProcessEnd()
    end.listen_for_signals()
    grpc_server = rpc.make_server()
    address = rpc.bind(grpc_server, config.host, config.port)
    wire_socket = rpc.take_port(config.host, config.wire_port, flag="--wire_port")
    log.info("port_bound", address=address, model=config.model)
    pool: list[MemoryT] = []

    def allocate_once(layout: KVLayout) -> memoryview:
        assert not pool, "an engine has one pool"
        pool.append(allocate(layout))
        return pool[0].buffer

    loaded = await _unless_asked_to_end(end, lambda: _load(config, allocate_once))
    if loaded is None:
        _exit_while_loading()
    staged = await _unless_asked_to_end(end, lambda: () if pool else (stage(loaded, allocate_once),))
    if staged is None:
        _exit_while_loading()
    server = LoadedServer(
        config=config,
        identity=ServerIdentity.of_this_process(config.role),
        loaded=loaded,
        memory=pool[0],
        on_crash=end.crash,
        staging=staged[0].layout if staged else None,
        copier=staged[0].copier if staged else None,
        device_pool=staged[0].device_pool if staged else None,
    )
    role = make_role(server)
    wire = WireServer()
    service = ServerService(role, server, wire)
    control_pb2_grpc.add_ServerServicer_to_server(service, grpc_server)
    role.add_services(grpc_server)
    wire.add("Server", service)
    wire.add(config.role.capitalize(), role)
    async with role:
        await wire.start(config.host, bound=wire_socket)
        await grpc_server.start()
        _say_ready(address, server, time.monotonic() - started_s)
        afterwards.begin(server.memory, loaded, end.crash)
        await end.asked.wait()
        await _drain(role, end)
        gone_within(CLOSE_S, EXIT_CRASHED)
        service.end_watches()
        await role.end_streams()
        grace_s = None if end.at_once.is_set() else GOODBYE_S
        await wire.stop(grace_s)
        await grpc_server.stop(grace_s)
    return end.exit_code


def _load(config: ServerConfig, allocate: Callable[[KVLayout], memoryview]) -> LoadedEngine:
    """The garbage collector stays away meanwhile, and from what is here for good ever after: half a million objects of
    imported modules, of which none is garbage. Looking at them costs a tenth of the import, and later a step's time."""
    gc.disable()
    try:
        from disaggregated.engine.load import load_engine  # Torch takes a second: the port is taken before it.

        loaded = load_engine(config, allocate=allocate)
    finally:
        gc.freeze()
        gc.enable()
    for remark in loaded.config.remarks:
        log.info("model_remarked", model=loaded.files.name, remark=remark)
    return loaded


async def _drain(role: Role, end: ProcessEnd) -> None:
    """Until the last request is gone, the deadline has passed, or the process has to end at once."""
    role.live_requests.begin_draining()
    waits = [asyncio.ensure_future(role.live_requests.wait_idle()), asyncio.ensure_future(end.at_once.wait())]
    await asyncio.wait(waits, timeout=DRAIN_ON_SIGNAL_S, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    log.info("drained", requests_left=len(role.live_requests))


def _say_ready(address: str, server: LoadedServer[MemoryT], seconds: float) -> None:
    """The one line on stdout; launchers and tests wait for it."""
    words = [
        f"READY {server.config.role} {address}",
        f"instance={server.identity.instance_id}",
        f"model={server.loaded.files.name}",
        f"blocks={server.loaded.layout.num_blocks}",
        f"ops={server.loaded.ops_name}",
        f"in {seconds:.1f} s",
    ]
    sys.stdout.write(" ".join(words) + "\n")
    sys.stdout.flush()


async def _unless_asked_to_end(end: ProcessEnd, blocking: Callable[[], ResultT]) -> ResultT | None:
    """The result of `blocking`, which runs on a thread of its own; None when a signal came first.

    Loading cannot be interrupted, so its thread is a daemon and is left behind: an executor would be waited for.
    """
    result: concurrent.futures.Future[ResultT] = concurrent.futures.Future()

    def work() -> None:
        try:
            result.set_result(blocking())
        except BaseException as error:  # noqa: BLE001 - it is raised where it is awaited
            result.set_exception(error)

    threading.Thread(target=work, name="load", daemon=True).start()
    loaded = asyncio.wrap_future(result)
    asked = asyncio.ensure_future(end.asked.wait())
    waits: list[asyncio.Future[Any]] = [asked, loaded]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    return loaded.result() if loaded.done() else None


def _exit_while_loading() -> NoReturn:
    """The interpreter's own way out would tear down what the loading thread is still computing with."""
    log.info("ended_while_loading")
    sys.stderr.flush()
    os._exit(0)
