"""NIXL by itself, through its public Python API: an agent as it comes, reads of 1 MiB of blocks, one after another."""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any, Final

import numpy as np

from benchmarks.wire import shapes
from benchmarks.wire.children import keep_standard_output, obey
from disaggregated.kv_layout import KVLayout
from kvtransfer import Region

BATCH_BYTES: Final = 1 << 20


class End:
    """A pool, and an agent that has registered it."""

    def __init__(self, name: str, layout: KVLayout) -> None:
        nixl = importlib.import_module("nixl_cu12")
        self._layout = layout
        self._region = shapes.touched(Region.allocate(layout.pool_bytes))
        self._agent: Any = nixl.nixl_agent(name, nixl.nixl_agent_config(backends=["UCX"]))
        self._agent.register_memory([(self._region.base_address, self._region.nbytes, 0, "")], "DRAM")

    def describe(self) -> tuple[str, int]:
        return self._agent.get_agent_metadata().hex(), self._region.base_address


class Source(End):
    def __init__(self, layout: KVLayout) -> None:
        super().__init__("source", layout)

    def connect(self, _: object) -> None:
        """Reads need it only the other way round."""

    def serve(self) -> None:
        """Its progress thread does."""


class Destination(End):
    def __init__(self, layout: KVLayout) -> None:
        super().__init__("destination", layout)
        self._peer = ""
        self._peer_address = 0

    def connect(self, described: tuple[str, int]) -> None:
        told = self._agent.add_remote_agent(bytes.fromhex(described[0]))
        self._peer = told.decode() if isinstance(told, bytes) else told
        self._peer_address = described[1]

    def take(self) -> float:
        begin_s = time.perf_counter()
        source = self._rows(self._peer_address, shapes.SOURCE_SEED)
        into = self._rows(self._region.base_address, shapes.INTO_SEED)
        step = max(1, BATCH_BYTES // self._layout.block_bytes)
        for begin in range(0, len(into), step):
            self._read(source[begin : begin + step], into[begin : begin + step])
        return time.perf_counter() - begin_s

    def _read(self, source: Any, into: Any) -> None:
        agent = self._agent
        local, remote = agent.get_xfer_descs(into, "DRAM"), agent.get_xfer_descs(source, "DRAM")
        transfer = agent.initialize_xfer("READ", local, remote, self._peer)
        state = agent.transfer(transfer)
        while state == "PROC":
            state = agent.check_xfer_state(transfer)
        assert state == "DONE", state
        agent.release_xfer_handle(transfer)

    def _rows(self, base_address: int, seed: int) -> Any:
        pieces = np.array(list(shapes.pieces(self._layout, shapes.scattered(self._layout, seed))), dtype=np.uint64)
        rows = np.zeros((len(pieces), 3), dtype=np.uint64)
        rows[:, 0] = pieces[:, 0] + np.uint64(base_address)
        rows[:, 1] = pieces[:, 1]
        return rows


if __name__ == "__main__":
    answers = keep_standard_output()
    ends = {"source": Source, "destination": Destination}
    end = ends[sys.argv[1]](KVLayout(**json.loads(sys.argv[3])))
    names = ("describe", "connect", "serve" if sys.argv[1] == "source" else "take")
    obey({name: getattr(end, name) for name in names}, answers)
