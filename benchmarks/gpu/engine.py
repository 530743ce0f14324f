"""Decode and prefill of a Llama-3-8B-shaped model: share of memory bandwidth, share of FLOP/s, time between kernels.

python -m benchmarks.gpu.engine bfloat16|fp8 [flashinfer]         flashinfer: decode attention by it, fast mode only
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Final

import torch

from benchmarks.gpu import llama
from benchmarks.gpu.figures import PEAK_BYTES_PER_S, PEAK_FLOP_PER_S, keep, measured_bandwidth, measured_flops
from disaggregated.config.server import KVCacheConfig, ServerConfig
from disaggregated.engine.api import PLACEHOLDER, ScheduledSequence
from disaggregated.engine.cuda.graphs import DecodeGraphs
from disaggregated.engine.cuda.runner import CudaModelRunner
from disaggregated.engine.load import load_engine
from disaggregated.kv_layout import KVLayout
from disaggregated.sampling_params import SamplingParams

BLOCK_SIZE: Final = 32
POOL_TOKENS: Final = 280_000
"""128 sequences of 2,048 tokens, or 32 of 8,192."""
NUM_STEPS: Final = 30
SHORT: Final = [(1, 1024), (8, 1024), (32, 1024), (64, 1024), (128, 1024)]
LONG: Final = [(1, 8192), (8, 8192), (32, 8192)]
"""(batch size, context)"""
GREEDY: Final = SamplingParams(max_tokens=1 << 20)


def no_host_memory(layout: KVLayout) -> bytearray:
    raise AssertionError("the pool of a CUDA engine is CUDA memory")


def make_runner(
    folder: pathlib.Path, dtype: str, *, deterministic: bool, attn_backend: str = "auto"
) -> CudaModelRunner:
    config = ServerConfig(
        model=str(llama.write_model(folder)),
        role="generation",
        device="cuda",
        dtype=dtype,
        load_format="dummy",
        max_batch_size=128,
        max_num_tokens=8192,
        max_seq_len=8448,
        deterministic=deterministic,
        attn_backend=attn_backend,
        kv_cache_config=KVCacheConfig(
            max_tokens=POOL_TOKENS, tokens_per_block=BLOCK_SIZE, dtype="fp8" if dtype == "fp8" else "auto"
        ),
    )
    started_s = time.monotonic()
    runner = load_engine(config, allocate=no_host_memory).runner
    assert isinstance(runner, CudaModelRunner)
    mode = "deterministic" if deterministic else "fast"
    keep(f"{dtype} {mode}: start", f"{time.monotonic() - started_s:.1f} s, graphs of {runner.graphs.sizes}")
    return runner


def tables(batch_size: int, length: int) -> Iterator[list[int]]:
    """Scattered blocks, none shared."""
    width = -(-length // BLOCK_SIZE)
    blocks = torch.randperm(POOL_TOKENS // BLOCK_SIZE, generator=torch.Generator().manual_seed(0)).tolist()
    for i in range(batch_size):
        yield blocks[i * width : (i + 1) * width]


def decode_seconds(runner: CudaModelRunner, batch_size: int, context: int, *, is_ahead: bool) -> float:
    """Of one step, tokens on the host included: the mean of `NUM_STEPS` after a few."""
    block_tables = list(tables(batch_size, context + NUM_STEPS + 8))

    def rows(step: int) -> list[ScheduledSequence]:
        return [
            ScheduledSequence(
                request_id=str(i),
                token_ids=[PLACEHOLDER if is_ahead and step else 1000 + i],
                first_position=context + step,
                block_table=table,
                sampling=GREEDY,
                previous_row=i if is_ahead and step else None,
            )
            for i, table in enumerate(block_tables)
        ]

    started_s = 0.0
    pending = runner.launch(rows(0))
    for step in range(1, NUM_STEPS + 5):
        if step == 5:
            torch.cuda.synchronize()
            started_s = time.perf_counter()
        if is_ahead:
            following = runner.launch(rows(step))
            pending.tokens()
            pending = following
        else:
            pending.tokens()
            pending = runner.launch(rows(step))
    pending.tokens()
    return (time.perf_counter() - started_s) / NUM_STEPS


def measure_decode(
    runner: CudaModelRunner, dtype: str, mode: str, cases: Sequence[tuple[int, int]], bandwidth: float
) -> None:
    bytes_each = 1 if dtype == "fp8" else 2
    for batch_size, context in cases:
        seconds = decode_seconds(runner, batch_size, context, is_ahead=True)
        num_bytes = llama.decode_bytes(batch_size, context, weight_bytes=bytes_each, kv_bytes=bytes_each)
        share = num_bytes / seconds / bandwidth
        peak = num_bytes / seconds / PEAK_BYTES_PER_S
        keep(
            f"{dtype} {mode}: decode, batch {batch_size}, context {context}",
            f"{seconds * 1e3:.2f} ms a step, {batch_size / seconds:.0f} tok/s, {peak:.2f} of 4.8 TB/s",
            share=share,
            of="measured copy bandwidth",
        )


def measure_overhead(runner: CudaModelRunner, dtype: str) -> None:
    captured = runner.graphs
    for batch_size in (1, 32):
        for graphs, is_ahead in ((captured, True), (captured, False), (None, True), (None, False)):
            runner.graphs = graphs or DecodeGraphs([], is_padding_enabled=False)
            seconds = decode_seconds(runner, batch_size, 1024, is_ahead=is_ahead)
            words = f"{'with' if graphs else 'without'} graphs, {'overlapped' if is_ahead else 'one after the other'}"
            keep(f"{dtype}: step of batch {batch_size}, {words}", f"{seconds * 1e3:.2f} ms")
    runner.graphs = captured


def measure_prefill(runner: CudaModelRunner, dtype: str, mode: str, flops: float) -> None:
    for num_tokens in (512, 1024, 2048, 4096, 8192):
        (table,) = tables(1, num_tokens)
        row = ScheduledSequence(
            request_id="prompt", token_ids=[7] * num_tokens, first_position=0, block_table=table, sampling=GREEDY
        )
        runner.execute([row])
        times = []
        for _ in range(3):
            started_s = time.perf_counter()
            runner.execute([row])
            times.append(time.perf_counter() - started_s)
        rate = llama.prefill_flops(num_tokens) / min(times)
        keep(
            f"{dtype} {mode}: prefill of {num_tokens}",
            f"{min(times) * 1e3:.1f} ms, {num_tokens / min(times):.0f} tok/s, "
            f"{rate / PEAK_FLOP_PER_S[dtype]:.2f} of the datasheet's FLOP/s",
            share=rate / flops,
            of="measured bf16 product",
        )


def flashinfer(dtype: str) -> None:
    bandwidth = measured_bandwidth()
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        runner = make_runner(pathlib.Path(folder), dtype, deterministic=False, attn_backend="flashinfer")
        measure_decode(runner, dtype, "fast, FlashInfer", SHORT + LONG, bandwidth)


def main(dtype: str) -> None:
    bandwidth, flops = measured_bandwidth(), measured_flops()
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        for mode in ("deterministic", "fast"):
            runner = make_runner(pathlib.Path(folder), dtype, deterministic=mode == "deterministic")
            measure_decode(runner, dtype, mode, SHORT if mode == "fast" else SHORT + LONG, bandwidth)
            measure_prefill(runner, dtype, mode, flops)
            if mode == "deterministic":
                measure_overhead(runner, dtype)
            del runner
            torch.cuda.empty_cache()


if __name__ == "__main__":
    (flashinfer if "flashinfer" in sys.argv[2:] else main)(sys.argv[1])
