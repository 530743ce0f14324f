"""The few calls of the CUDA runtime that map another process's memory, through `cuda-bindings`.

Everything else that touches a device is the engine's. The bindings are NVIDIA's own and come with newer CUDA builds of
torch; `pip install 'disaggregated[cuda]'` brings them anywhere. They are imported when a mapper is made, not before: a
server on a CPU never loads them.

Both the bindings' runtime and torch's work in the device's primary context, so an address of one is good in the other.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from typing import Any, Final, Protocol

from disaggregated import logs
from disaggregated.errors import TransferError
from kvtransfer.device_pool import DevicePool, Exported, Mapped, SharedPool
from kvtransfer.negotiate import Preference
from kvtransfer.region import memory_at
from kvtransfer.transports import cuda_ipc
from kvtransfer.transports.cuda_ipc import HANDLE_BYTES

log = logs.get(__name__)

_PACKAGE: Final = "cuda.bindings"


def missing() -> str | None:
    """As a transport's `missing`: what this process lacks to copy from device to device."""
    try:
        found = importlib.util.find_spec(_PACKAGE) is not None
    except ModuleNotFoundError:  # There is no package `cuda` at all.
        found = False
    return None if found else "needs the cuda-bindings package: pip install 'disaggregated[cuda]'"


def load(device_index: int) -> CudaMapper:
    """For a pool on that device. Raises TransferError when the bindings, or what they need, are not there."""
    if reason := missing():
        raise TransferError(f"copies from device to device {reason}")
    try:
        driver, runtime = (importlib.import_module(f"{_PACKAGE}.{name}") for name in ("driver", "runtime"))
    except ImportError as error:  # Built for another CUDA, or for another system.
        raise TransferError(f"cuda-bindings cannot be loaded: {error}") from error
    return CudaMapper(driver, runtime, device_index)


class CudaPool(DevicePool, Protocol):
    @property
    def device_index(self) -> int: ...


def shared(pool: CudaPool | None, preference: Preference, *, is_wanted: bool = True) -> SharedPool | None:
    """`pool`, where processes of this host may copy from it and it from theirs; None, and a line in the log, where not.

    It is SHM's way, so it is for those who would use SHM first, unless their configuration does not want it.
    """
    if pool is None or not is_wanted or preference.order()[0] != cuda_ipc.NAME:
        return None
    try:
        mapper = load(pool.device_index)
    except TransferError as error:
        log.warning("device_pool_not_shared", device=pool.device, reason=str(error), so=cuda_ipc.OTHERWISE)
        return None
    return cuda_ipc.share(pool, mapper)


class CudaMapper:
    """Implements `DeviceMapper`. Memory is mapped into the context of one device, whose kernels read it."""

    def __init__(self, driver: Any, runtime: Any, device_index: int) -> None:
        """`driver` and `runtime` are the modules of `cuda.bindings`."""
        self._driver = driver
        self._runtime = runtime
        self._device_index = device_index
        self._lock = threading.Lock()
        """Opening and closing count references inside the driver; nobody is served by doing two at once."""

    def export(self, address: int, nbytes: int) -> Exported:
        self._use_device()
        base, size = self._asked("cuMemGetAddressRange", self._driver.cuMemGetAddressRange, address)
        offset = address - int(base)
        if not 0 <= offset <= int(size) - nbytes:
            raise TransferError(f"{nbytes} bytes at {offset} are not within an allocation of {int(size)} bytes")
        (handle,) = self._asked("cudaIpcGetMemHandle", self._runtime.cudaIpcGetMemHandle, int(base))
        return Exported(bytes(_bytes_of(handle)), offset, nbytes)

    def open(self, exported: Exported) -> Mapped:
        handle = self._runtime.cudaIpcMemHandle_t()
        _bytes_of(handle)[:] = exported.handle
        flags = int(self._runtime.cudaIpcMemLazyEnablePeerAccess)
        with self._lock:
            self._use_device()
            (base,) = self._asked("cudaIpcOpenMemHandle", self._runtime.cudaIpcOpenMemHandle, handle, flags)
        return Mapped(int(base), int(base) + exported.offset)

    def close(self, mapped: Mapped) -> None:
        with self._lock:
            self._use_device()
            self._asked("cudaIpcCloseMemHandle", self._runtime.cudaIpcCloseMemHandle, mapped.base)

    def _use_device(self) -> None:
        """A thread begins at the first device, and without a context."""
        self._asked("cudaSetDevice", self._runtime.cudaSetDevice, self._device_index)

    def _asked(self, name: str, call: Any, *arguments: Any) -> tuple[Any, ...]:
        """What `call` returns behind its error code. The bindings raise RuntimeError where there is no driver."""
        try:
            error, *found = call(*arguments)
        except RuntimeError as refusal:
            raise TransferError(f"{name}: {refusal}") from refusal
        if int(error) != 0:
            raise TransferError(f"{name}: {error.name}")
        return tuple(found)


def _bytes_of(handle: Any) -> memoryview:
    """The C struct behind a `cudaIpcMemHandle_t`, which is its bytes and nothing else; valid while `handle` lives.

    The bindings of CUDA 12 call them `reserved`, those of CUDA 13 have no name for them; all have `getPtr`.
    """
    return memory_at(int(handle.getPtr()), HANDLE_BYTES)
