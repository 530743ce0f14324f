"""Our transport alone, in two processes: reads of the parts that a pull makes, of blocks that everybody may read."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Final

from benchmarks.wire import shapes
from benchmarks.wire.children import keep_standard_output, obey
from disaggregated.kv_layout import KVLayout
from disaggregated.security.membership import join_as_told
from disaggregated.security.tls import TlsFiles
from kvtransfer import Region, registry
from kvtransfer.checksum import block_sums
from kvtransfer.deadline import Deadline
from kvtransfer.runs import Run
from kvtransfer.transport import BlockRead, Offer, OurEnd, PeerLink, ReadStop, SourceIdentity

PART_BYTES: Final = 64 << 20
EPOCH: Final = 1
SUMS_UP_VARIABLE: Final = "BENCH_SUMS_UP"
SUMS_UP: Final = bool(os.environ.get(SUMS_UP_VARIABLE))
"""Reads carry running checksums, as those of a pull do."""


class OpenGate:
    """Every block is published, to everybody."""

    def check_read(
        self, *, lease_key: bytes, epoch: int, blocks: Sequence[Run], layers: range, peer_id: str
    ) -> None: ...


class Source:
    def __init__(self, library: str, layout: KVLayout) -> None:
        region = shapes.touched(Region.allocate(layout.pool_bytes))
        self._endpoint = registry.load(library).make_endpoint(region, layout, epoch=EPOCH, host="127.0.0.1")
        self._endpoint.start(OpenGate())

    def describe(self) -> dict[str, str]:
        return dataclasses.asdict(self._endpoint.describe())

    def connect(self, _: object) -> None:
        """Destinations connect to us."""

    def serve(self) -> None:
        """Its threads do."""


class Destination:
    def __init__(self, library: str, layout: KVLayout) -> None:
        self._layout = layout
        region = shapes.touched(Region.allocate(layout.pool_bytes))
        us = OurEnd(region=region, layout=layout, peer_id="bench", progress_timeout_s=5.0)
        self._transport = registry.load(library).make_transport(us)
        self._link: PeerLink | None = None

    def describe(self) -> None:
        """Nobody connects to us."""

    def connect(self, offer: dict[str, str]) -> None:
        source = SourceIdentity(instance_id="bench", epoch=EPOCH, layout=self._layout)
        self._link = self._transport.connect(Offer(**offer), source, deadline=Deadline.after(10))

    def take(self) -> float:
        assert self._link is not None
        layout = self._layout
        source = shapes.scattered(layout, shapes.SOURCE_SEED)
        into = shapes.scattered(layout, shapes.INTO_SEED)
        step = max(1, PART_BYTES // (layout.block_bytes * layout.num_layers))
        begin_s = time.perf_counter()
        for begin in range(0, layout.num_blocks, step):
            order = BlockRead(
                lease_key=bytes(16),
                epoch=EPOCH,
                source=source[begin : begin + step],
                into=into[begin : begin + step],
                layers=range(layout.num_layers),
                sums=block_sums(len(source[begin : begin + step]), layout) if SUMS_UP else None,
            )
            self._link.read(order, stop=ReadStop(), deadline=Deadline.after(60))
        return time.perf_counter() - begin_s


if __name__ == "__main__":
    answers = keep_standard_output()
    join_as_told(secret_file="", tls=TlsFiles())
    ends = {"source": Source, "destination": Destination}
    end = ends[sys.argv[1]](sys.argv[2], KVLayout(**json.loads(sys.argv[3])))
    names = ("describe", "connect", "serve" if sys.argv[1] == "source" else "take")
    obey({name: getattr(end, name) for name in names}, answers)
