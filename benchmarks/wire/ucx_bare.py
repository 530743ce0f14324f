"""ucxx by itself: pack 2 MiB, send it, unpack it; four buffers in turns at each end, and nothing else."""

from __future__ import annotations

import importlib
import json
import mmap
import sys
import time
from typing import Any, Final

from benchmarks.wire import shapes
from benchmarks.wire.children import keep_standard_output, obey
from disaggregated.kv_layout import KVLayout
from kvtransfer import Region
from kvtransfer.region import address_of, copy_bytes

CHUNK_BYTES: Final = 2 << 20
NUM_BUFFERS: Final = 4
WAIT_MS: Final = 1000


class End:
    """A pool, a worker, an endpoint to the other end's worker, and two buffers."""

    def __init__(self, layout: KVLayout, seed: int) -> None:
        self._ucx = importlib.import_module("ucxx._lib.libucxx")
        self._array = importlib.import_module("ucxx._lib.arr").Array
        self._region = shapes.touched(Region.allocate(layout.pool_bytes))
        per_chunk = max(1, CHUNK_BYTES // layout.block_bytes)
        pieces = list(shapes.pieces(layout, shapes.scattered(layout, seed)))
        self._chunks = [pieces[begin : begin + per_chunk] for begin in range(0, len(pieces), per_chunk)]
        self._buffers = [memoryview(mmap.mmap(-1, CHUNK_BYTES)) for _ in range(NUM_BUFFERS)]
        self._addresses = [address_of(buffer) for buffer in self._buffers]
        context = self._ucx.UCXContext({}, (self._ucx.Feature.TAG, self._ucx.Feature.WAKEUP))
        self._worker = self._ucx.UCXWorker(context)
        self._worker.init_blocking_progress_mode()
        self._tag = self._ucx.UCXXTag(0)
        self._endpoint: Any = None

    def describe(self) -> str:
        return bytes(self._worker.address.tobytes()).hex()

    def connect(self, address: str) -> None:
        told = self._ucx.UCXAddress.create_from_buffer(bytes.fromhex(address))
        self._endpoint = self._ucx.UCXEndpoint.create_from_worker_address(self._worker, told, True)

    def _wait(self, request: Any) -> None:
        while not request.completed:
            self._worker.progress_worker_event(WAIT_MS)
        request.check_error()


class Source(End):
    def __init__(self, layout: KVLayout) -> None:
        super().__init__(layout, shapes.SOURCE_SEED)

    def serve(self) -> None:
        sending: list[Any] = []
        for number, chunk in enumerate(self._chunks):
            if number >= NUM_BUFFERS:
                self._wait(sending[number - NUM_BUFFERS])
            at = 0
            for offset, size in chunk:
                copy_bytes(self._addresses[number % NUM_BUFFERS] + at, self._region.base_address + offset, size)
                at += size
            message = self._buffers[number % NUM_BUFFERS][:at]
            sending.append(self._endpoint.tag_send(self._array(message), self._tag))
        for request in sending[-NUM_BUFFERS:]:
            self._wait(request)


class Destination(End):
    def __init__(self, layout: KVLayout) -> None:
        super().__init__(layout, shapes.INTO_SEED)

    def take(self) -> float:
        begin_s = time.perf_counter()
        receiving = [self._receive(number) for number in range(min(NUM_BUFFERS, len(self._chunks)))]
        for number, chunk in enumerate(self._chunks):
            self._wait(receiving[number])
            at = 0
            for offset, size in chunk:
                copy_bytes(self._region.base_address + offset, self._addresses[number % NUM_BUFFERS] + at, size)
                at += size
            if number + NUM_BUFFERS < len(self._chunks):
                receiving.append(self._receive(number + NUM_BUFFERS))
        return time.perf_counter() - begin_s

    def _receive(self, number: int) -> Any:
        size = sum(size for _, size in self._chunks[number])
        return self._worker.tag_recv(self._array(self._buffers[number % NUM_BUFFERS][:size]), self._tag)


if __name__ == "__main__":
    answers = keep_standard_output()
    ends = {"source": Source, "destination": Destination}
    end = ends[sys.argv[1]](KVLayout(**json.loads(sys.argv[3])))
    names = ("describe", "connect", "serve" if sys.argv[1] == "source" else "take")
    obey({name: getattr(end, name) for name in names}, answers)
