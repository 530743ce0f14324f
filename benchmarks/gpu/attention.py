"""Decode attention of one layer, Llama-3-8B's heads: our kernel beside FlashInfer, where that is installed."""

from __future__ import annotations

from typing import Final

import torch

from benchmarks.gpu import llama
from benchmarks.gpu.figures import keep, measured_bandwidth, seconds_each
from disaggregated.engine.cuda import flashinfer_decode
from disaggregated.engine.cuda.kernels import attention
from disaggregated.engine.ops.api import AttentionBatch, AttentionSpec, LayerPool

BLOCK_SIZE: Final = 32
NUM_BLOCKS: Final = 10_000
CASES: Final = [(1, 1024), (8, 1024), (32, 1024), (128, 1024), (1, 8192), (8, 8192), (32, 8192)]
"""(batch size, context)"""
SPEC: Final = AttentionSpec(scale=llama.HEAD_DIM**-0.5)


def batch_of(batch_size: int, context: int) -> AttentionBatch:
    """Scattered blocks, none shared; the last token of each is being decoded."""
    width = context // BLOCK_SIZE
    blocks = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(0))[: batch_size * width]
    return AttentionBatch(
        query_start=torch.arange(batch_size + 1, dtype=torch.int32, device="cuda"),
        first_position=torch.full((batch_size,), context - 1, dtype=torch.int32, device="cuda"),
        block_tables=blocks.to("cuda", torch.int32).view(batch_size, width),
        positions=torch.full((batch_size,), context - 1, dtype=torch.int64, device="cuda"),
        slots=torch.zeros(batch_size, dtype=torch.int64, device="cuda"),
        max_context_len=context,
        rows=((context - 1, 1),) * batch_size,
    )


def main() -> None:
    bandwidth = measured_bandwidth()
    device = torch.device("cuda")
    size = (NUM_BLOCKS, 2, llama.NUM_KV_HEADS, BLOCK_SIZE, llama.HEAD_DIM)
    pool = LayerPool(torch.randn(size, device=device, dtype=torch.bfloat16))
    num_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    flashinfer = flashinfer_decode.load(device, is_deterministic=False)
    if flashinfer is None:
        keep("decode attention: FlashInfer", f"not measured: {flashinfer_decode.missing()}")
    for batch_size, context in CASES:
        batch = batch_of(batch_size, context)
        q = torch.randn(batch_size, llama.NUM_HEADS, llama.HEAD_DIM, device=device, dtype=torch.bfloat16)
        num_bytes = batch_size * context * 2 * llama.NUM_KV_HEADS * llama.HEAD_DIM * 2

        def ours(q: torch.Tensor = q, batch: AttentionBatch = batch) -> torch.Tensor:
            return attention.paged_attention(q, pool, batch, SPEC, num_multiprocessors=num_multiprocessors)

        def theirs(q: torch.Tensor = q, batch: AttentionBatch = batch) -> torch.Tensor:
            assert flashinfer is not None
            found = flashinfer.attend(q, pool, batch, SPEC)
            assert found is not None, "FlashInfer did not take it"
            return found

        contenders = {"our kernel": ours} if flashinfer is None else {"our kernel": ours, "FlashInfer": theirs}
        if flashinfer is not None:
            torch.testing.assert_close(ours(), theirs(), rtol=2e-2, atol=2e-2)
        for name, call in contenders.items():
            seconds = seconds_each(call)
            keep(
                f"decode attention: batch {batch_size}, context {context}, {name}",
                f"{seconds * 1e6:.0f} µs a layer",
                share=num_bytes / seconds / bandwidth,
                of="measured copy bandwidth",
            )


if __name__ == "__main__":
    main()
