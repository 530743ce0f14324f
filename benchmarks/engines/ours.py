"""Our engine in this process, as a server runs it: scheduler, paged pool, sampler and all.

python -m benchmarks.engines.ours MODEL --precision int8 --threads 1
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

from benchmarks.engines.measurement import (
    BATCH_SIZES,
    CONTEXT_LEN,
    DECODE_STEPS,
    PREFILL_LENGTHS,
    Measurement,
    random_prompt,
    say,
)
from disaggregated.config.server import KVCacheConfig, ServerConfig
from disaggregated.engine.api import EngineRequest, RequestKind, TokensSampled
from disaggregated.engine.engine import LLMEngine
from disaggregated.engine.load import load_engine
from disaggregated.sampling_params import SamplingParams

REPEATS = 3


def make_engine(model: str, precision: str, threads: int) -> LLMEngine:
    """The chunk of 512 tokens that a context server takes by default; room for 32 sequences and a long prompt."""
    kv_cache = KVCacheConfig(max_tokens=32 * (CONTEXT_LEN + DECODE_STEPS + 64), enable_block_reuse=False)
    config = ServerConfig(
        model=model, role="generation", dtype=precision, num_threads=threads, device="cpu", kv_cache_config=kv_cache
    )
    return load_engine(config, allocate=lambda layout: bytearray(layout.pool_bytes)).engine


def requests(count: int, length: int, max_tokens: int, first_seed: int) -> Iterator[EngineRequest]:
    for seed in range(first_seed, first_seed + count):
        yield EngineRequest(
            request_id=f"{seed}-{length}-{count}",
            kind=RequestKind.FULL,
            token_ids=random_prompt(length, seed),
            sampling=SamplingParams(max_tokens=max_tokens),
        )


def prefill_seconds(engine: LLMEngine, length: int, seed: int) -> float:
    (request,) = requests(1, length, 1, seed)
    start = time.perf_counter()
    engine.submit(request)
    while engine.has_work:
        engine.step()
    return time.perf_counter() - start


def decode_seconds(engine: LLMEngine, batch_size: int, seed: int) -> list[float]:
    """Of each step in which all of the batch decode and nobody begins or ends."""
    ids = set()
    for request in requests(batch_size, CONTEXT_LEN, DECODE_STEPS + 8, seed):
        engine.submit(request)
        ids.add(request.request_id)
    seconds: list[float] = []
    decoding: set[str] = set()
    while len(seconds) < DECODE_STEPS:
        is_full = decoding == ids
        start = time.perf_counter()
        events = engine.step()
        if is_full:
            seconds.append(time.perf_counter() - start)
        decoding |= {event.request_id for event in events if isinstance(event, TokensSampled)}
    for request_id in ids:
        engine.cancel(request_id)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    engine = make_engine(arguments.model, arguments.precision, arguments.threads)
    measured = Measurement(f"ours {arguments.precision}", arguments.threads)
    prefill_seconds(engine, CONTEXT_LEN, 1)
    for length in PREFILL_LENGTHS:
        say(f"prefill {length}")
        measured.prefill[str(length)] = [prefill_seconds(engine, length, 10 + i) for i in range(REPEATS)]
    for batch_size in BATCH_SIZES:
        say(f"decode, batch {batch_size}")
        measured.decode[str(batch_size)] = decode_seconds(engine, batch_size, 100 * batch_size)
    measured.tell()


if __name__ == "__main__":
    main()
