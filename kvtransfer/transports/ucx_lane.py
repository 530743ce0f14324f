"""One connection's way through UCX: a worker of its own, and one endpoint to the worker of the peer.

A worker is driven by the thread that serves its connection, while that thread has something in flight, and by nobody
else. So an idle connection costs nothing, two reads share no lock, and once a lane is closed nothing moves in it again.

    the thread ── progress ── nothing left to do? ── arm ── sleep until the worker's descriptor or the control socket

UCX's error handling is on: only then can an endpoint be closed by force, which ends every transfer in it at once, also
when the peer is stopped and will never answer. The price is that UCX then leaves its shared-memory lanes aside, a third
of what one host can do; on one host our own SHM is faster than those, too.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
from collections.abc import Sequence
from typing import Any, Final

from disaggregated import logs
from disaggregated.errors import PeerLost, TransferError
from kvtransfer.transports.frame_socket import FrameSocket

log = logs.get(__name__)

_CLOSE_ROUNDS_MAX: Final = 100
"""Of progress, until what was in flight has to have ended. A forced close takes one or two."""
_making = threading.Lock()
_never_ended: list[object] = []
"""What a library did not let go of, kept from being freed. Empty unless UCX breaks its word; see `UcxLane.close`."""


@functools.cache
def library() -> Any:
    """`ucxx`'s core. Raises TransferError when it cannot be loaded."""
    os.environ.setdefault("UCX_RCACHE_MAX_UNRELEASED", "1024")  # Else memory that was given back piles up.
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")  # ucxx sets some that this build of UCX does not know.
    try:
        return importlib.import_module("ucxx._lib.libucxx")
    except (ImportError, OSError) as error:
        raise TransferError(f"UCX: ucxx cannot be loaded: {error}") from error


@functools.cache
def _context(loopback_only: bool) -> Any:
    """One for the process: UCX looks for devices once. Without a word from the user it opens no device but its own."""
    ucx = library()
    options = {"NET_DEVICES": "lo"} if loopback_only and "UCX_NET_DEVICES" not in os.environ else {}
    try:
        return ucx.UCXContext(options, (ucx.Feature.TAG, ucx.Feature.WAKEUP))
    except ucx.UCXError as error:
        raise TransferError(f"UCX finds no way to the network (UCX_TLS, UCX_NET_DEVICES?): {error}") from error


class UcxLane:
    """Not thread-safe, but for `close` after the thread that used it has gone.

    Invariant: every request that was posted is in `_posted` until it has ended.
    """

    def __init__(self, *, loopback_only: bool) -> None:
        """Raises TransferError when UCX cannot start here."""
        self._ucx = library()
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

    @property
    def address(self) -> bytes:
        """For the peer's `connect`; a few hundred bytes."""
        return bytes(self._worker.address.tobytes())

    def connect(self, peer_address: bytes) -> None:
        """Returns at once; the two workers find each other when something is sent. Raises TransferError."""
        try:
            address = self._ucx.UCXAddress.create_from_buffer(peer_address)
            self._endpoint = self._ucx.UCXEndpoint.create_from_worker_address(self._worker, address, True)
        except (self._ucx.UCXError, IndexError, ValueError) as error:
            raise TransferError(f"UCX cannot reach the peer's worker: {error}") from error

    def send(self, message: memoryview, tag: int) -> Any:
        """`message` must not change before `wait` has returned for this request."""
        array = importlib.import_module("ucxx._lib.arr").Array
        return self._post(lambda: self._endpoint.tag_send(array(message), self._ucx.UCXXTag(tag)))

    def receive(self, into: memoryview, tag: int) -> Any:
        """A message of exactly `len(into)` bytes. It may be written until this request has ended."""
        array = importlib.import_module("ucxx._lib.arr").Array
        return self._post(lambda: self._worker.tag_recv(array(into), self._ucx.UCXXTag(tag)))

    def wait(self, request: Any, control: FrameSocket, *, while_it_may_speak: bool = False) -> None:
        """Until `request` has ended well, while `control` is silent, unless the peer `may_speak`.

        Raises:
            PeerLost: the request failed, the peer closed `control`, or nothing moved for the progress timeout.
            TransferTimeout: the deadline of `control` passed.
        """
        while not self._has_ended(request):
            if self._sleep(control, listening=not while_it_may_speak):
                control.receive_frame()  # Whatever it is, it is not what belongs here: raises.

    def wait_for_word(self, control: FrameSocket) -> None:
        """Until the peer speaks on `control`, or closes it. What is in flight goes on. Raises as `wait` does."""
        self._worker.progress()
        while not self._sleep(control):
            self._worker.progress()

    def _has_ended(self, request: Any) -> bool:
        """After doing what there is to do. Raises PeerLost when it ended badly."""
        self._worker.progress()
        if not request.completed:
            return False
        self._posted.remove(request)
        try:
            request.check_error()
        except self._ucx.UCXError as error:
            raise PeerLost(f"UCX lost the peer: {error or type(error).__name__}") from error
        return True

    def close(self) -> bool:
        """End whatever is in flight and let go of the worker. True when UCX has: nothing can be written any more.

        False, which has not been seen: some request did not end. It is never driven again, and never freed. Idempotent.
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

    def _post(self, posting: Any) -> Any:
        if self._endpoint is None:
            raise TransferError("the peer has told no address of a UCX worker")
        try:
            request = posting()
        except self._ucx.UCXError as error:
            raise PeerLost(f"UCX lost the peer: {error or type(error).__name__}") from error
        self._posted.append(request)
        return request

    def _sleep(self, control: FrameSocket, *, listening: bool = True) -> bool:
        """Until UCX has something to do, or the peer has said something (True)."""
        if not self._worker.arm():
            return False
        return control.watch(self._worker.epoll_file_descriptor, listening=listening)


def quarantined() -> Sequence[object]:
    """What is kept because UCX did not let go of it."""
    return tuple(_never_ended)
