"""The memory of a KV pool: written by one process, readable by its peers, and safe against both ends' mistakes.

A pool is a memfd. Its owner maps it writable and then seals it, so that from there on

    nobody can shrink it    a reader would die of SIGBUS in the middle of a copy
    nobody can grow it      its size says which layout it holds
    nobody else can write   F_SEAL_FUTURE_WRITE: no new writable mapping, in no process, not even through /proc

A reader gets the descriptor over a unix socket, checks these seals and maps it read-only.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from types import TracebackType
from typing import Final, Self

import numpy as np

from disaggregated.errors import NotEnoughMemory, TransferError

F_SEAL_FUTURE_WRITE: Final = 0x0010
"""Not in Python's fcntl; Linux 5.1."""
_MADV_POPULATE_WRITE: Final = 23
"""Not in Python's mmap; Linux 5.14."""
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE


class Region:
    """Our own pool's memory: `nbytes` of zeroes that only this process can write."""

    def __init__(self, fd: int, mapping: mmap.mmap) -> None:
        """Takes ownership of both; use `allocate`."""
        self.fd = fd
        self.buffer = memoryview(mapping)
        """Writable. Views made of it (the engine's tensors) keep the mapping alive after `close`."""
        self.nbytes = len(mapping)
        self.base_address = address_of(self.buffer)

    @classmethod
    def allocate(cls, nbytes: int, *, populate: bool = False) -> Region:
        """Pages are taken from the system when they are first touched, or all of them here with `populate`.

        Raises NotEnoughMemory when the system refuses the address range or the pages.
        """
        assert nbytes > 0, f"a region of {nbytes} bytes"
        fd = os.memfd_create("disaggregated-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            mapping = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
        except (OSError, OverflowError, ValueError) as error:
            os.close(fd)
            raise NotEnoughMemory(f"no {nbytes:,} bytes for the KV pool: {error}") from error
        region = cls(fd, mapping)
        if populate:
            region.populate()
        return region

    def populate(self) -> None:
        """Take all pages from the system; those that are there stay as they are. May run beside whoever uses them.

        Servers do so: a page's first touch costs microseconds, which a prompt of 512 tokens would pay thousands of
        times, and memory that is not there is better missed at start than in the middle of a request.
        Raises NotEnoughMemory.
        """
        if _LIBC.madvise(self.base_address, self.nbytes, _MADV_POPULATE_WRITE):  # Python's own keeps the GIL.
            number = ctypes.get_errno()
            if number != errno.EINVAL:  # An older kernel: pages come when they are touched.
                raise NotEnoughMemory(f"no {self.nbytes:,} bytes for the KV pool: {os.strerror(number)}")

    def close(self) -> None:
        """Close the descriptor. The memory goes when its last view does, here and in every peer."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class MappedRegion:
    """A peer's pool, mapped read-only: a write through it is a segmentation fault, never damage to the peer."""

    def __init__(self, fd: int, *, nbytes: int) -> None:
        """Map and close `fd`, which is owned from here on.

        Raises TransferError when it is not a sealed region of exactly `nbytes`.
        """
        try:
            check_seals(fd, nbytes=nbytes)
            self._mapping = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise TransferError(f"the peer's memory cannot be mapped: {error}") from error
        finally:
            os.close(fd)
        self.nbytes = nbytes
        self.base_address = address_of(memoryview(self._mapping))

    def view(self) -> memoryview:
        """Read-only. Released before `close`."""
        return memoryview(self._mapping)

    def close(self) -> None:
        """Unmap. No copy out of it may be running, which is the caller's to know."""
        self._mapping.close()


def check_seals(fd: int, *, nbytes: int) -> None:
    """Raises TransferError unless nobody can change the size of `fd` any more, or map it writable."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise TransferError("the peer's descriptor is not a memfd") from error
    if seals & _SEALS != _SEALS:
        raise TransferError(f"the peer's memory is not sealed: seals are {seals:#x}, wanted {_SEALS:#x}")
    if (size := os.fstat(fd).st_size) != nbytes:
        raise TransferError(f"the peer's memory is {size} bytes, its layout says {nbytes}")


def address_of(view: memoryview) -> int:
    """The address of a view's first byte; the view must outlive its use."""
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)


def memory_at(address: int, num_bytes: int) -> memoryview:
    """Writable, and owned by nobody: whoever maps the memory must outlive it."""
    return memoryview((ctypes.c_uint8 * num_bytes).from_address(address)).cast("B")


def copy_bytes(to_address: int, from_address: int, num_bytes: int) -> None:
    """One memcpy with the interpreter lock released; the caller has checked both ranges."""
    ctypes.memmove(to_address, from_address, num_bytes)
