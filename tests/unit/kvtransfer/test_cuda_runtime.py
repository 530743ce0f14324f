"""Mapping another process's memory: what is asked of CUDA's bindings, in which order, and what its refusals become.

The bindings are NVIDIA's; a driver that keeps books takes the part of theirs.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum

import pytest

from disaggregated.errors import TransferError
from kvtransfer import Preference
from kvtransfer.device_pool import Exported, Mapped
from kvtransfer.transports import cuda_runtime
from kvtransfer.transports.cuda_ipc import pack_exported, unpack_exported
from kvtransfer.transports.cuda_runtime import CudaMapper
from kvtransfer.transports.frames import MalformedFrame
from tests.support.fake_gpu import FakeDevicePool
from tests.support.kv_pools import SMALL

BASE = 0x7F00_0000_0000
SIZE = 1 << 30


class Result(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorPeerAccessUnsupported = 217


class Handle:
    """`cudaIpcMemHandle_t`: a C struct, of which only the address is to be had in every version."""

    def __init__(self, told: bytes = bytes(64)) -> None:
        self._struct = ctypes.create_string_buffer(told, 64)

    def getPtr(self) -> int:
        return ctypes.addressof(self._struct)

    @property
    def told(self) -> bytes:
        return self._struct.raw


@dataclasses.dataclass
class Cuda:
    """Both modules of the bindings, over one allocation of one device."""

    cudaIpcMemLazyEnablePeerAccess: int = 1
    cudaIpcMemHandle_t: type[Handle] = Handle
    refuses: Result = Result.cudaSuccess
    has_driver: bool = True
    calls: list[tuple[object, ...]] = dataclasses.field(default_factory=list)

    def cudaSetDevice(self, index: int) -> tuple[Result]:
        self.calls.append(("device", index))
        return (Result.cudaSuccess,)

    def cuMemGetAddressRange(self, address: int) -> tuple[object, ...]:
        if not self.has_driver:
            raise RuntimeError('"cuda" is an NVIDIA driver library and can only be found via system search')
        return Result.cudaSuccess, BASE, SIZE

    def cudaIpcGetMemHandle(self, address: int) -> tuple[object, ...]:
        self.calls.append(("export", address))
        return (self.refuses, Handle(bytes(range(64))) if self.refuses == 0 else None)

    def cudaIpcOpenMemHandle(self, handle: Handle, flags: int) -> tuple[object, ...]:
        self.calls.append(("open", handle.told, flags))
        return (self.refuses, 0x1000 if self.refuses == 0 else None)

    def cudaIpcCloseMemHandle(self, address: int) -> tuple[object, ...]:
        self.calls.append(("close", address))
        return (self.refuses,)


def test_a_pool_within_an_allocation_is_exported_by_the_allocation_and_its_place() -> None:
    cuda = Cuda()
    exported = CudaMapper(cuda, cuda, 3).export(BASE + 512, 4096)
    assert exported == Exported(bytes(range(64)), 512, 4096)
    assert cuda.calls == [("device", 3), ("export", BASE)]


@pytest.mark.parametrize(("address", "nbytes"), [(BASE + SIZE - 10, 11), (BASE - 1, 4), (BASE, SIZE + 1)])
def test_what_reaches_out_of_its_allocation_is_not_exported(address: int, nbytes: int) -> None:
    cuda = Cuda()
    with pytest.raises(TransferError, match="are not within an allocation"):
        CudaMapper(cuda, cuda, 0).export(address, nbytes)
    assert ("export", BASE) not in cuda.calls


def test_another_process_finds_the_pool_where_it_lies_in_the_mapping() -> None:
    cuda = Cuda()
    mapper = CudaMapper(cuda, cuda, 1)
    mapped = mapper.open(Exported(bytes(range(64)), 512, 4096))
    assert mapped == Mapped(base=0x1000, address=0x1000 + 512)
    mapper.close(mapped)
    opened = ("open", bytes(range(64)), 1)
    assert cuda.calls == [("device", 1), opened, ("device", 1), ("close", 0x1000)], "the mapping is closed by its base"


def test_a_refusal_is_told_by_the_name_that_cuda_gives_it() -> None:
    cuda = Cuda(refuses=Result.cudaErrorPeerAccessUnsupported)
    mapper = CudaMapper(cuda, cuda, 0)
    with pytest.raises(TransferError, match="cudaIpcOpenMemHandle: cudaErrorPeerAccessUnsupported"):
        mapper.open(Exported(bytes(64), 0, 1))
    with pytest.raises(TransferError, match="cudaIpcGetMemHandle: cudaErrorPeerAccessUnsupported"):
        mapper.export(BASE, 1)


def test_a_machine_without_a_driver_refuses_in_words() -> None:
    cuda = Cuda(has_driver=False)
    with pytest.raises(TransferError, match=r"cuMemGetAddressRange: .* NVIDIA driver library"):
        CudaMapper(cuda, cuda, 0).export(BASE, 1)


def test_what_travels_in_a_welcome_comes_out_as_it_went_in() -> None:
    exported = Exported(bytes(range(64)), 1 << 40, (1 << 37) + 8)
    assert unpack_exported(pack_exported(exported)) == exported
    for tail in (b"", pack_exported(exported)[:-1], pack_exported(exported) + b"x"):
        with pytest.raises(MalformedFrame, match="a tail of"):
            unpack_exported(tail)


class IndexedPool(FakeDevicePool):
    device_index = 0


@pytest.mark.parametrize(
    ("preference", "is_wanted"), [(Preference("TCP"), True), (Preference("TCP", True), True), (Preference(), False)]
)
def test_a_pool_is_shared_only_for_who_would_use_shared_memory_first(
    preference: Preference, is_wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_runtime, "load", lambda index: pytest.fail("the bindings were loaded"))
    assert cuda_runtime.shared(IndexedPool(SMALL, seed=None), preference, is_wanted=is_wanted) is None
    assert cuda_runtime.shared(None, Preference()) is None


def test_without_the_bindings_blocks_travel_by_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_runtime, "_PACKAGE", "no_such_package.bindings")
    assert cuda_runtime.missing() == "needs the cuda-bindings package: pip install 'disaggregated[cuda]'"
    assert cuda_runtime.shared(IndexedPool(SMALL, seed=None), Preference()) is None


def test_the_bindings_that_are_installed_have_what_we_call() -> None:
    """On a machine without a device they refuse at the first call, with CUDA's own words."""
    if cuda_runtime.missing():
        pytest.skip("cuda-bindings is not installed")
    mapper = cuda_runtime.load(0)
    handle = mapper._runtime.cudaIpcMemHandle_t()
    cuda_runtime._bytes_of(handle)[:] = bytes(range(64))
    assert bytes(cuda_runtime._bytes_of(handle)) == getattr(handle, "reserved", bytes(range(64)))
    assert int(mapper._runtime.cudaIpcMemLazyEnablePeerAccess) == 1
    with pytest.raises(TransferError, match="cu"):
        mapper.open(Exported(bytes(64), 0, 1))
