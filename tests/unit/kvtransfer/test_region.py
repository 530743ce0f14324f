import fcntl
import mmap
import os

import numpy as np
import pytest

from disaggregated.errors import NotEnoughMemory, TransferError
from kvtransfer.region import F_SEAL_FUTURE_WRITE, MappedRegion, Region


def mapped(region: Region) -> MappedRegion:
    return MappedRegion(os.dup(region.fd), nbytes=region.nbytes)


def test_a_reader_sees_what_the_owner_writes_later() -> None:
    with Region.allocate(8192) as region:
        reader = mapped(region)
        region.buffer[100] = 7
        assert bytes(reader.view()[99:102]) == b"\0\7\0"
        reader.close()


def test_nobody_can_map_a_region_writable_once_it_is_ours() -> None:
    with Region.allocate(4096) as region:
        with pytest.raises(PermissionError):
            mmap.mmap(region.fd, 4096, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(PermissionError):
            os.pwrite(region.fd, b"x", 0)
        reopened = os.open(f"/proc/self/fd/{region.fd}", os.O_RDWR)
        with pytest.raises(PermissionError):
            os.pwrite(reopened, b"x", 0)
        os.close(reopened)


@pytest.mark.parametrize("size", [0, 2048, 8192])
def test_nobody_can_change_the_size_of_a_region(size: int) -> None:
    with Region.allocate(4096) as region, pytest.raises(PermissionError):
        os.ftruncate(region.fd, size)


def test_the_seals_cannot_be_added_to_or_lifted() -> None:
    with Region.allocate(4096) as region, pytest.raises(PermissionError):
        fcntl.fcntl(region.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


@pytest.mark.parametrize(
    "seals", [0, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, F_SEAL_FUTURE_WRITE]
)
def test_a_region_that_is_not_fully_sealed_is_refused(seals: int) -> None:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    with pytest.raises(TransferError, match="not sealed"):
        MappedRegion(fd, nbytes=4096)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_region_of_another_size_than_promised_is_refused() -> None:
    with Region.allocate(4096) as region, pytest.raises(TransferError, match="4096 bytes, its layout says 8192"):
        MappedRegion(os.dup(region.fd), nbytes=8192)


def test_a_descriptor_that_is_no_memfd_is_refused() -> None:
    reading, writing = os.pipe()
    os.close(writing)
    with pytest.raises(TransferError, match="not a memfd"):
        MappedRegion(reading, nbytes=4096)


def test_what_cannot_be_allocated_is_said_in_words_and_leaves_no_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(NotEnoughMemory, match="KV pool"):
        Region.allocate(1 << 62)
    assert os.listdir("/proc/self/fd") == before


def test_tensors_on_the_buffer_outlive_the_region() -> None:
    region = Region.allocate(4096)
    tensor = np.frombuffer(region.buffer, dtype=np.uint8)
    region.close()
    region.close()
    del region
    tensor[:] = 3
    assert int(tensor.sum()) == 3 * 4096


@pytest.mark.parametrize("populate", [True, False])
def test_a_populated_region_has_its_pages_before_they_are_touched(populate: bool) -> None:
    nbytes = 1 << 20
    with Region.allocate(nbytes, populate=populate) as region:
        assert os.fstat(region.fd).st_blocks * 512 == (nbytes if populate else 0)
        assert not any(region.buffer[::4096])


def test_populating_a_region_in_use_leaves_what_is_written() -> None:
    with Region.allocate(1 << 20) as region:
        region.buffer[4096:4100] = b"kept"
        region.populate()
        assert bytes(region.buffer[4095:4101]) == b"\0kept\0"
        assert os.fstat(region.fd).st_blocks * 512 == 1 << 20
