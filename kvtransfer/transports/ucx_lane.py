"""One connection's way through UCX: a worker of its own, and one endpoint to the worker of the peer.

A worker is driven by the thread that serves its connection, while that thread has something in flight, and by nobody
else. So an idle connection costs nothing, two reads share no lock, and once a lane is closed nothing moves in it again.

    the thread ── progress ── nothing left to do? ── arm ── sleep until the worker's descriptor or the control socket

UCX's error handling is on: only then can an endpoint be closed by force, which ends every transfer in it at once, also
when the peer is stopped and will never answer. The price is that UCX then leaves its shared-memory lanes aside, two
thirds of what one host can do; on one host our own SHM is faster than those, too.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
from collections.abc import Mapping
from typing import Any, Final

from disaggregated import logs
from disaggregated.errors import PeerLost, TransferError
from kvtransfer.deadline import Deadline
from kvtransfer.transports.frame_socket import FrameSocket
from kvtransfer.transports.frames import Kind, MalformedFrame

log = logs.get(__name__)

_CLOSE_ROUNDS_MAX: Final = 100
"""Of progress, until what was in flight has to have ended. A forced close takes one or two."""
_SEGMENT_SIZES: Final = ("TCP_TX_SEG_SIZE", "TCP_RX_SEG_SIZE")
_SEGMENT_SIZE: Final = "256k"
"""UCX's own 8 KB cost a system call and a wake-up each: with these a transfer takes 0.6 times as long."""
_making = threading.Lock()
_never_ended: list[object] = []
"""What UCX did not let go of, kept from being freed. Empty unless UCX breaks its word; see `UcxLane.close`."""


@functools.cache
def library() -> Any:
    """`ucxx`'s core. Raises TransferError when it cannot be loaded."""
    os.environ.setdefault("UCX_RCACHE_MAX_UNRELEASED", "1024")  # Else memory that was given back piles up.
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")  # ucxx sets some that this build of UCX does not know.
    try:
        importlib.import_module("ucxx._lib.arr")
        return importlib.import_module("ucxx._lib.libucxx")
    except (ImportError, OSError) as error:
        raise TransferError(f"UCX: ucxx cannot be loaded: {error}") from error


@functools.cache
def _context(loopback_only: bool) -> Any:
    """Made once: UCX looks for devices then."""
    ucx = library()
    try:
        return ucx.UCXContext(_options(loopback_only, os.environ), (ucx.Feature.TAG, ucx.Feature.WAKEUP))
    except ucx.UCXError as error:
        raise TransferError(f"UCX finds no way to the network (UCX_TLS, UCX_NET_DEVICES?): {error}") from error


def _options(loopback_only: bool, environ: Mapping[str, str]) -> dict[str, str]:
    """Where the user says nothing: no device but loopback's for loopback, and TCP in large segments."""
    options = {"NET_DEVICES": "lo"} if loopback_only and "UCX_NET_DEVICES" not in environ else {}
    if not any(f"UCX_{name}" in environ for name in _SEGMENT_SIZES):  # UCX refuses two that do not fit each other.
        options |= dict.fromkeys(_SEGMENT_SIZES, _SEGMENT_SIZE)
    return options


class UcxLane:
    """Used by one thread at a time.

    Invariant: each request that was posted is in `_posted` until it has ended.
    """

    def __init__(self, *, loopback_only: bool) -> None:
        """Raises TransferError when UCX cannot start here."""
        self._ucx = library()
        self._array = importlib.import_module("ucxx._lib.arr").Array
        self._tag = self._ucx.UCXXTag(0)  # One for all: a lane keeps their order.
        self._endpoint: Any = None
        self._posted: list[Any] = []
        self._has_let_go = True
        with _making:
            context = _context(loopback_only)
        try:
            self._worker = self._ucx.UCXWorker(context)
            self._worker.init_blocking_progress_mode()
        except self._ucx.UCXError as error:
            raise TransferError(f"UCX: no worker: {error}") from error

    def address(self, *, deadline: Deadline) -> bytes:
        """A few hundred bytes, known at once."""
        return bytes(self._worker.address.tobytes())

    def connect(self, peer: bytes, *, deadline: Deadline) -> None:
        """Returns at once; the two workers find each other when something is sent."""
        try:
            address = self._ucx.UCXAddress.create_from_buffer(peer)
            self._endpoint = self._ucx.UCXEndpoint.create_from_worker_address(self._worker, address, True)
        except (self._ucx.UCXError, IndexError, ValueError) as error:
            raise TransferError(f"UCX cannot reach the peer's worker: {error}") from error

    def send(self, message: memoryview) -> UcxPassage:
        if self._endpoint is None:
            raise TransferError("the peer has told no address of a UCX worker")
        try:
            return self._posting(self._endpoint.tag_send(self._array(message), self._tag))
        except self._ucx.UCXError as error:
            raise self._lost(error) from error

    def receive(self, message: memoryview) -> UcxPassage:
        try:
            return self._posting(self._worker.tag_recv(self._array(message), self._tag))
        except self._ucx.UCXError as error:
            raise self._lost(error) from error

    def hear(self, connection: FrameSocket) -> None:
        self._worker.progress()
        while not self._worker.arm() or not connection.watch(self._worker.epoll_file_descriptor):
            self._worker.progress()

    def has_ended(self, request: Any) -> bool:
        """After doing what there is to do. Raises PeerLost when it ended badly."""
        self._worker.progress()
        if not request.completed:
            return False
        self._posted.remove(request)
        try:
            request.check_error()
        except self._ucx.UCXError as error:
            raise self._lost(error) from error
        return True

    def sleep(self, connection: FrameSocket, *, listening: bool) -> None:
        """Until UCX has something to do. Raises when the peer has gone, or, `listening`, speaks."""
        if self._worker.arm() and connection.watch(self._worker.epoll_file_descriptor, listening=listening):
            kind, _ = connection.receive_frame(*Kind)  # Raises for what a peer says that ends.
            raise MalformedFrame(f"a {kind.name} in the middle of blocks")

    def close(self) -> bool:
        """End whatever is in flight and let go of the worker: when this is True, nothing can be written any more.

        False is rare, and was seen when a peer was killed: some request did not end. Its worker is never driven again,
        and never freed.
        """
        if self._worker is None:
            return self._has_let_go
        try:
            if self._endpoint is not None:
                self._endpoint.close_blocking()
            for _ in range(_CLOSE_ROUNDS_MAX):
                self._worker.progress()
                if all(request.completed for request in self._posted):
                    break
                self._worker.cancel_inflight_requests()
        except self._ucx.UCXError as error:
            log.warning("ucx_lane_closed_badly", reason=str(error))
        self._has_let_go = all(request.completed for request in self._posted)
        if not self._has_let_go:
            log.error("ucx_request_never_ended", requests=len(self._posted))
            _never_ended.append((self._posted, self._endpoint, self._worker))
        self._posted = []
        self._endpoint = self._worker = None
        return self._has_let_go

    def _posting(self, request: Any) -> UcxPassage:
        self._posted.append(request)
        return UcxPassage(self, request)

    def _lost(self, error: Exception) -> PeerLost:
        return PeerLost(f"UCX lost the peer: {error or type(error).__name__}")


class UcxPassage:
    """A request of a lane, and how to wait for it: by driving the lane."""

    def __init__(self, lane: UcxLane, request: Any) -> None:
        self._lane = lane
        self._request = request

    def wait(self, connection: FrameSocket, *, listening: bool) -> None:
        while not self._lane.has_ended(self._request):
            self._lane.sleep(connection, listening=listening)
