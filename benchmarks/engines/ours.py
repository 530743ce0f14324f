"""Our engine in this process, as a server runs it: scheduler, paged pool, sampler and all.

python -m benchmarks.engines.ours MODEL --precision int8 --threads 1 [--dense]
"""

from __future__ import annotations

import argparse
import os
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
from disaggregated.engine.load import LoadedEngine, load_engine
from disaggregated.sampling_params import SamplingParams

REPEATS = 3
FILLING = b"\x3c"
"""Of the KV pool: a small number in every dtype, and memory that is really there: untouched pages all share one."""


def load(model: str, precision: str, threads: int) -> LoadedEngine:
    """The chunk of 512 tokens that a context server takes by default; room for 32 sequences and a long prompt."""
    kv_cache = KVCacheConfig(max_tokens=32 * (CONTEXT_LEN + DECODE_STEPS + 64), enable_block_reuse=False)
    config = ServerConfig(
        model=model, role="generation", dtype=precision, num_threads=threads, device="cpu", kv_cache_config=kv_cache
    )
    return load_engine(config, allocate=lambda layout: bytearray(FILLING * layout.pool_bytes))


def make_engine(model: str, precision: str, threads: int) -> LLMEngine:
    return load(model, precision, threads).engine


def requests(kind: RequestKind, count: int, length: int, max_tokens: int, first_seed: int) -> Iterator[EngineRequest]:
    for seed in range(first_seed, first_seed + count):
        yield EngineRequest(
            request_id=f"{seed}-{length}-{count}",
            kind=kind,
            token_ids=random_prompt(length, seed),
            sampling=SamplingParams(max_tokens=max_tokens),
        )


def prefill_seconds(engine: LLMEngine, length: int, seed: int) -> float:
    (request,) = requests(RequestKind.FULL, 1, length, 1, seed)
    start = time.perf_counter()
    engine.submit(request)
    while engine.has_work:
        engine.step()
    return time.perf_counter() - start


def decode_seconds(engine: LLMEngine, batch_size: int, seed: int) -> list[float]:
    """Of each step, as on a generation server: the prompts' KV has come from elsewhere (here it is just there)."""
    batch = list(requests(RequestKind.FROM_REMOTE, batch_size, CONTEXT_LEN, DECODE_STEPS + 8, seed))
    for request in batch:
        engine.reserve(request)
        engine.admit(request.request_id, first_token=1000)
    seconds: list[float] = []
    for _ in range(DECODE_STEPS):
        start = time.perf_counter()
        num_tokens = sum(len(event.token_ids) for event in engine.step() if isinstance(event, TokensSampled))
        seconds.append(time.perf_counter() - start)
        assert num_tokens == batch_size, f"{num_tokens} tokens in a step of {batch_size} sequences"
    for request in batch:
        engine.cancel(request.request_id)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dense", action="store_true", help="keep float32 weights as they are")
    arguments = parser.parse_args()
    os.environ["DISAGG_DENSE_WEIGHTS"] = "1" if arguments.dense else "0"
    loaded = load(arguments.model, arguments.precision, arguments.threads)
    engine, name = loaded.engine, f"ours {arguments.precision}{' dense' if arguments.dense else ''}"
    measured = Measurement(name, arguments.threads, weight_bytes=dict(loaded.linear_bytes))
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
