"""NIXL as we use it: one agent, one registered region, reads in small batches, and an end that is an end.

Three things that NIXL leaves to its user are settled here:

*Its progress thread* polls without pause as Python's API makes it, a core for each agent. Made with a delay it sleeps
in poll() on UCX's descriptor: nothing while idle, and it needs no Python to answer a peer while this process is busy.

*A cancelled transfer goes on writing.* Only the end of the agent ends it: UCX's worker goes, and with it every
connection over which a byte could come. So an agent is the fence; those who share one end it together (`nixl_reads`).

*A peer that dies in the middle of a large read* over UCX's TCP lanes takes the other process down with it (NIXL 1.5.1,
UCX 1.21; with its own error handling sooner than without). So without an RDMA device that handling is off, we watch the
control socket instead, and no more is in flight than a socket's buffers hold.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import threading
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from disaggregated import logs
from disaggregated.errors import PeerLost, TransferError
from kvtransfer.region import Region

log = logs.get(__name__)

PLUGIN_VARIABLE: Final = "TRTLLM_NIXL_KVCACHE_BACKEND"
PLUGINS: Final = ("UCX", "LIBFABRIC")
PROGRESS_DELAY_US: Final = 100_000
"""The library's thread looks around that often without having been woken: UCX may forget to wake it."""

Descriptors = npt.NDArray[np.uint64]
"""(count, 3): address, bytes, device 0."""

_making = threading.Lock()


@functools.cache
def library() -> Any:
    """NIXL's bindings. Raises TransferError when they cannot be loaded."""
    os.environ.setdefault("UCX_RCACHE_MAX_UNRELEASED", "1024")  # Else memory that was given back piles up.
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
    try:
        return importlib.import_module("nixl_cu12._bindings")
    except (ImportError, OSError) as error:
        raise TransferError(f"NIXL: nixl_cu12 cannot be loaded: {error}") from error


def chosen_plugin() -> str:
    """What TRTLLM_NIXL_KVCACHE_BACKEND asks for; UCX where it says nothing, or what does not exist."""
    wanted = os.environ.get(PLUGIN_VARIABLE, "UCX")
    if wanted in PLUGINS:
        return wanted
    log.warning("nixl_plugin_not_known", wanted=wanted, variable=PLUGIN_VARIABLE, used="UCX")
    return "UCX"


class NixlAgent:
    """Thread-safe, but for `close`: nobody may be inside another method then, or call one later."""

    def __init__(self, name: str, region: Region, *, plugin: str, peer_errors: bool, loopback_only: bool) -> None:
        """`region` stays open until `close`. `name` must be new in the cluster: peers remember names.

        Raises TransferError when NIXL or its plugin cannot start here.
        """
        self._nixl = library()
        self.name = name
        self._region = region
        with _making:
            if loopback_only:  # UCX reads it when the plugin starts, and listens on every device without it.
                os.environ.setdefault("UCX_NET_DEVICES", "lo")
            self._agent, self._backend = self._make(plugin, peer_errors)
        whole = [(region.base_address, region.nbytes, 0, "")]
        self._registered = self._nixl.nixlRegDList(self._nixl.DRAM_SEG, whole)
        try:
            self._agent.registerMem(self._registered, [self._backend])
        except self._errors as error:
            raise TransferError(f"NIXL: {plugin} cannot register {region.nbytes:,} bytes: {error}") from error

    @property
    def metadata(self) -> bytes:
        """How to reach this agent and its region: a capability, for members of the cluster only."""
        return bytes(self._agent.getLocalMD())

    def add_peer(self, metadata: bytes) -> str:
        """The peer's name. Raises TransferError. NIXL does not notice a flipped bit: prove `metadata` before."""
        try:
            told = self._agent.loadRemoteMD(metadata)
        except self._errors as error:
            raise TransferError(f"NIXL cannot use what the peer told of itself: {error}") from error
        return told.decode() if isinstance(told, bytes) else str(told)

    def read(self, peer: str, source: Descriptors, into: Descriptors) -> Any:
        """Begin to read; `has_ended` tells the rest. May itself copy everything before it returns (CMA).

        Raises PeerLost. Then, too, something may have begun that only `close` ends.
        """
        nixl = self._nixl
        try:
            local, remote = nixl.nixlXferDList(nixl.DRAM_SEG, into), nixl.nixlXferDList(nixl.DRAM_SEG, source)
            transfer = self._agent.createXferReq(nixl.NIXL_READ, local, remote, peer, b"", [self._backend])
            self._agent.postXferReq(transfer, b"")
        except self._errors as error:
            raise PeerLost(f"NIXL lost the peer: {error}") from error
        return transfer

    def has_ended(self, transfer: Any) -> bool:
        """True once, when every byte is here. Raises PeerLost when it failed: only `close` is an end then."""
        try:
            if self._agent.getXferStatus(transfer) == self._nixl.NIXL_IN_PROG:
                return False
            self._agent.releaseXferReq(transfer)
        except self._errors as error:
            raise PeerLost(f"NIXL lost the peer: {error}") from error
        return True

    def forget(self, transfer: Any) -> None:
        """Give its handle back. What it has begun goes on until `close`."""
        with contextlib.suppress(*self._errors):
            self._agent.releaseXferReq(transfer)

    def close(self) -> None:
        """When this returns, nothing of any read can land, and no peer can read. Takes tens of milliseconds."""
        try:
            self._agent.deregisterMem(self._registered, [self._backend])
        except self._errors as error:
            log.warning("nixl_region_not_deregistered", agent=self.name, reason=str(error))
        del self._agent  # The last reference: its destructor ends the thread, the worker and every connection.

    def _make(self, plugin: str, peer_errors: bool) -> tuple[Any, Any]:
        nixl = self._nixl
        settings = nixl.nixlAgentConfig()
        settings.useProgThread = True
        settings.pthrDelay = PROGRESS_DELAY_US
        settings.syncMode = nixl.NIXL_THREAD_SYNC_RW
        options = {} if plugin != "UCX" else {"ucx_error_handling_mode": "peer" if peer_errors else "none"}
        try:
            agent = nixl.nixlAgent(self.name, settings)
            if plugin not in agent.getAvailPlugins():
                raise TransferError(f"NIXL: its {plugin} plugin is not installed ({PLUGIN_VARIABLE}, NIXL_PLUGINS_DIR)")
            return agent, agent.createBackend(plugin, options)
        except self._errors as error:
            raise TransferError(f"NIXL: its {plugin} plugin cannot start here: {error}") from error

    @property
    def _errors(self) -> tuple[type[Exception], ...]:
        named = [getattr(self._nixl, name) for name in dir(self._nixl) if name.endswith("Error")]
        return (RuntimeError, ValueError, *named)
