"""What converting KV between unlike pools costs, beside copying the same bytes: python -m benchmarks.conversion

A prompt of Llama-3-8B's shape, block by block as a pull converts it, on one thread. Medians of turns within one run.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from typing import Final

import numpy as np

from disaggregated.kv_layout import KVLayout
from disaggregated.kv_shard import KVHolding, tensor_parallel
from kvtransfer.checksum import block_checksums
from kvtransfer.conversion.executor import Executor, PoolView
from kvtransfer.conversion.planner import plan_conversion
from kvtransfer.conversion.tokens import TokenMap, TokenPlan

ROUNDS: Final = 7
NUM_TOKENS: Final = 512
LLAMA: Final = KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, block_size=32, dtype="bfloat16", num_blocks=16)


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    name: str
    source: KVHolding
    ours: KVHolding


def rows() -> list[Row]:
    whole = KVHolding.whole(LLAMA)

    def pool(**changes: object) -> KVHolding:
        layout = dataclasses.replace(LLAMA, **changes)  # type: ignore[arg-type]
        return KVHolding.whole(dataclasses.replace(layout, num_blocks=layout.num_blocks_for(NUM_TOKENS)))

    return [
        Row("blocks of 32 into blocks of 16", whole, pool(block_size=16)),
        Row("blocks of 16 into blocks of 64", pool(block_size=16), pool(block_size=64)),
        Row("all heads into one of 2 ranks", whole, tensor_parallel(whole, 0, 2)),
        Row("all heads into one of 4 ranks", whole, tensor_parallel(whole, 0, 4)),
        Row("bfloat16 into float32", whole, pool(dtype="float32")),
        Row("float32 into bfloat16", pool(dtype="float32"), whole),
        Row("bfloat16 into int8", whole, pool(dtype="int8")),
        Row("bfloat16 into float8_e4m3fn", whole, pool(dtype="float8_e4m3fn")),
        Row("int8 into bfloat16", pool(dtype="int8"), whole),
        Row("float8_e4m3fn into bfloat16", pool(dtype="float8_e4m3fn"), whole),
    ]


def measure(row: Row) -> tuple[float, float, float]:
    """Seconds for the prompt: converted, its source bytes copied with memcpy, and checksummed."""
    source, ours = (memoryview(bytearray(each.layout.pool_bytes)) for each in (row.source, row.ours))
    copied = memoryview(bytearray(len(source)))
    values = PoolView(source, row.source.layout)
    values.values[:] = np.random.default_rng(0).integers(-64, 64, values.values.shape, np.int8)
    if values.scales is not None:
        values.scales[:] = 0.01
    (pieces,) = plan_conversion([row.source], row.ours).pieces
    executor = Executor(values, PoolView(ours, row.ours.layout), pieces)
    tokens = TokenPlan(TokenMap.of(row.source, NUM_TOKENS), TokenMap.of(row.ours, NUM_TOKENS), begin=0, end=NUM_TOKENS)
    blocks = range(row.source.layout.num_blocks_for(NUM_TOKENS))
    layers = range(LLAMA.num_layers)

    def convert() -> None:
        for block in blocks:
            for segment in tokens.segments(block):
                executor.convert(block, segment, segment.into_block, layers)

    def copy() -> None:
        copied[:] = source

    def check() -> None:
        block_checksums(source, row.source.layout, tuple(blocks))

    times: dict[Callable[[], None], list[float]] = {convert: [], copy: [], check: []}
    for turn in range(ROUNDS + 1):
        for job, taken in times.items():
            begin = time.perf_counter()
            job()
            if turn:
                taken.append(time.perf_counter() - begin)
    converted, memcpy, checked = (statistics.median(taken) for taken in times.values())
    return converted, memcpy, checked


def main() -> None:
    sys.stdout.write(
        "| conversion | GB/s of source bytes | memcpy GB/s | ratio | checksum GB/s |\n|---|---|---|---|---|\n"
    )
    for row in rows():
        converted, memcpy, checked = measure(row)
        size = row.source.layout.pool_bytes / 1e9
        rates = [size / converted, size / memcpy, memcpy / converted, size / checked]
        sys.stdout.write(f"| {row.name} | {' | '.join(f'{rate:.2f}' for rate in rates)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
