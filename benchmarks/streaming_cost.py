"""What streaming costs the prefill: a prompt computed with nobody who wants it, and published as it is computed.

    python -m benchmarks.streaming_cost [int8] [float32]

One engine in this process, the context server's own stream and publisher, and a source that nobody reads from: what is
left is the calls between layers, the news, and the checksums beside the engine's threads. The ways take turns.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from typing import Final

from benchmarks import report
from benchmarks.engines.ours import requests
from context_server.streaming import PrefillStream
from disaggregated.config.server import KVCacheConfig, ServerConfig
from disaggregated.engine.api import RequestKind
from disaggregated.engine.load import LoadedEngine, load_engine
from disaggregated.kv_layout import KVLayout
from kvtransfer import PoolIdentity, Publisher, Region, SourceOptions, TransferSource

MODEL: Final = "smollm2-135m-instruct"
NUM_TOKENS: Final = 2000
CHUNK_SIZE: Final = 256
NUM_ROUNDS: Final = 5
PRECISIONS: Final = ("int8", "float32")
GROUPS: Final = {"chunk by chunk": 0, "4 MiB": 4 << 20, "1 MiB": 1 << 20, "layer by layer": 1}
DEFAULT: Final = "4 MiB"
NOBODY: Final = "nobody wants it"
COST_MAX: Final = 0.01


class Streaming:
    """An engine and what stands behind it in a context server, without the server."""

    def __init__(self, precision: str) -> None:
        config = ServerConfig(
            model=MODEL,
            role="context",
            dtype=precision,
            device="cpu",
            max_num_tokens=CHUNK_SIZE,
            kv_cache_config=KVCacheConfig(max_tokens=2 * NUM_TOKENS, enable_block_reuse=False),
        )
        self.regions: list[Region] = []
        self.loaded: LoadedEngine = load_engine(config, allocate=self._allocate)
        self.source = TransferSource(
            self.regions[0],
            PoolIdentity.whole(self.loaded.layout, instance_id="benchmark", epoch=1, fingerprint=""),
            on_released=lambda _: None,
            options=SourceOptions(endpoints=[]),
        )
        self.publisher = Publisher(self.source, on_crash=lambda error: print("the publisher crashed:", error))
        self.publisher.start()

    def _allocate(self, layout: KVLayout) -> memoryview:
        self.regions.append(Region.allocate(layout.pool_bytes, populate=True))
        return self.regions[0].buffer

    def prefill(self, group_bytes: int | None, seed: int) -> tuple[float, float, int]:
        """Seconds, CPU seconds of all threads, and publications of one prompt; None: no transfer of it is open."""
        engine = self.loaded.engine
        (request,) = requests(RequestKind.PREFILL_ONLY, 1, NUM_TOKENS, 1, seed)
        transfer_id = f"{request.request_id}-{time.monotonic_ns()}"
        transfers = {} if group_bytes is None else {request.request_id: transfer_id}
        stream = PrefillStream(transfers, self.publisher, self.loaded.layout, layer_group_bytes=group_bytes or 0)
        engine.watch_layers(stream)
        self.source.open(transfer_id, num_tokens=NUM_TOKENS)
        begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        engine.submit(request)
        while engine.has_work:
            stream.step_is_over(engine.step())
        seconds, cpu_seconds = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
        num_publications = self.source.num_publications(transfer_id)
        self.source.fail(transfer_id, "measured")
        engine.release(request.request_id)
        return seconds, cpu_seconds, num_publications

    def close(self) -> None:
        self.publisher.close(deadline_s=5)
        self.regions[0].close()


def rows_of(precision: str) -> Iterator[report.Row]:
    streaming = Streaming(precision)
    ways: dict[str, int | None] = {NOBODY: None, **GROUPS}
    seen: dict[str, list[tuple[float, float, int]]] = {way: [] for way in ways}
    streaming.prefill(None, 0)
    for number in range(NUM_ROUNDS):
        for way, group_bytes in ways.items():
            seen[way].append(streaming.prefill(group_bytes, number + 1))
    streaming.close()
    for way, measured in seen.items():
        seconds = [each[0] for each in measured]
        extra = statistics.median(s / n[0] for (s, _, _), n in zip(measured, seen[NOBODY], strict=True)) - 1
        cpu = statistics.median(c / n[1] for (_, c, _), n in zip(measured, seen[NOBODY], strict=True)) - 1
        what = f"{precision}, {way}: {measured[0][2]} publications"
        row = report.Row(what=what, seen=report.spread(seconds, "ms", scale=1e3))
        yield row
        if way != NOBODY:
            yield report.Row(
                what=f"{precision}, {way}: more than with nobody (median of pairs; CPU time)",
                seen=f"{extra:+.2%}; {cpu:+.2%}",
                bar=f"under {COST_MAX:.0%} of CPU time" if way == DEFAULT else "",
                holds=cpu < COST_MAX if way == DEFAULT else None,
            )


def main() -> None:
    rows = [row for precision in sys.argv[1:] or PRECISIONS for row in rows_of(precision)]
    report.write("streaming-cost", f"Prefill of {NUM_TOKENS} tokens in chunks of {CHUNK_SIZE}, streamed", rows)


if __name__ == "__main__":
    main()
