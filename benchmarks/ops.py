"""How fast each native op is, beside torch and beside what the machine can do at all.

python -m benchmarks.ops [--threads 1] [--isa avx2]

Shapes are SmolLM2-135M's. Rooflines are measured in the same run (`roofline.py`). Time is the median over rounds in
which native and torch take turns; torch computes in float32 throughout.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator

import torch

from benchmarks import linears, report, roofline
from benchmarks.linears import COLD_BYTES, FFN, HIDDEN, VOCABULARY
from benchmarks.roofline import Case, Roofline
from disaggregated.engine.ops import native
from disaggregated.engine.ops.api import AttentionBatch, AttentionSpec, LayerPool, Ops
from disaggregated.engine.ops.native_isa import best_isa

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 9, 3, 64, 32


def attention_cases(ops: Ops) -> Iterator[Case]:
    for rows, queries, cached in ((1, 1, 512), (8, 1, 512), (32, 1, 512), (1, 1, 4096), (1, 512, 0), (1, 512, 1536)):
        batch, num_blocks = attention_batch(rows, queries, cached)
        shape = (num_blocks, 2, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        pool_bytes = 4 * num_blocks * 2 * NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
        pools = [torch.randn(shape) for _ in range(1 + (COLD_BYTES // pool_bytes if queries == 1 else 0))]
        yield attention_case(ops, f"attention {rows} rows × {queries} queries, {cached} cached", pools, batch)


def attention_batch(rows: int, queries: int, cached: int) -> tuple[AttentionBatch, int]:
    length = cached + queries
    blocks = -(-length // BLOCK_SIZE)
    tables = torch.randperm(rows * blocks).to(torch.int32).reshape(rows, blocks)
    positions = torch.arange(cached, length).repeat(rows)
    slots = tables.long().repeat_interleave(queries, 0).gather(1, (positions // BLOCK_SIZE)[:, None])[:, 0]
    return AttentionBatch(
        query_start=torch.arange(rows + 1, dtype=torch.int32) * queries,
        first_position=torch.full((rows,), cached, dtype=torch.int32),
        block_tables=tables,
        positions=positions,
        slots=slots * BLOCK_SIZE + positions % BLOCK_SIZE,
        max_context_len=length,
    ), rows * blocks


def attention_case(ops: Ops, name: str, pools: list[torch.Tensor], batch: AttentionBatch) -> Case:
    """Torch gathers the blocks and calls its fused attention; all rows are equally long, which suits it."""
    rows = len(batch.first_position)
    queries, length = len(batch.positions) // rows, batch.max_context_len
    spec = AttentionSpec(scale=HEAD_DIM**-0.5)
    q_TND = torch.randn(rows * queries, NUM_HEADS, HEAD_DIM)
    q_RNQD = q_TND.view(rows, queries, NUM_HEADS, HEAD_DIM).transpose(1, 2)
    tables = batch.block_tables.long()
    mask = torch.arange(length) <= torch.arange(length - queries, length)[:, None]
    ours, theirs = itertools.cycle(pools), itertools.cycle(pools)

    def gathered() -> torch.Tensor:
        blocks = next(theirs)[tables].permute(2, 0, 3, 1, 4, 5).flatten(3, 4)[:, :, :, :length]
        return torch.nn.functional.scaled_dot_product_attention(
            q_RNQD, blocks[0], blocks[1], attn_mask=mask, enable_gqa=True
        )

    seen = sum(range(length - queries + 1, length + 1))
    return Case(
        name=name,
        ours=lambda: ops.paged_attention(q_TND, LayerPool(next(ours)), batch, spec),
        theirs=gathered,
        num_bytes=8 * rows * length * NUM_KV_HEADS * HEAD_DIM if queries == 1 else 0,
        num_operations=4 * rows * seen * NUM_HEADS * HEAD_DIM,
    )


def elementwise_cases(ops: Ops) -> Iterator[Case]:
    weight_H = torch.randn(HIDDEN)
    angles = torch.randn(2048, HEAD_DIM // 2)
    for rows in (1, 32, 512):
        x, gate_up, q = torch.randn(rows, HIDDEN), torch.randn(rows, 2 * FFN), torch.randn(rows, NUM_HEADS, HEAD_DIM)
        yield Case(
            name=f"rms_norm {rows} × {HIDDEN}",
            ours=lambda x=x: ops.rms_norm(x, weight_H, 1e-5),  # type: ignore[misc]
            theirs=lambda x=x: torch.nn.functional.rms_norm(x, (HIDDEN,), weight_H, 1e-5),  # type: ignore[misc]
            num_bytes=8 * x.numel(),
        )
        yield Case(
            name=f"silu_mul {rows} × {FFN}",
            ours=lambda x=gate_up: ops.silu_mul(x),  # type: ignore[misc]
            theirs=lambda x=gate_up: torch.nn.functional.silu(x[:, :FFN]) * x[:, FFN:],  # type: ignore[misc]
            num_bytes=6 * gate_up.numel(),
        )
        yield rope_case(ops, q, angles.cos(), angles.sin())


def rope_case(ops: Ops, q_TND: torch.Tensor, cos_PD: torch.Tensor, sin_PD: torch.Tensor) -> Case:
    positions_T = torch.arange(len(q_TND))

    def rotated() -> torch.Tensor:
        cos, sin = cos_PD[positions_T][:, None].repeat(1, 1, 2), sin_PD[positions_T][:, None].repeat(1, 1, 2)
        low, high = q_TND.chunk(2, -1)
        return q_TND * cos + torch.cat((-high, low), -1) * sin

    return Case(
        name=f"rope {len(q_TND)} × {NUM_HEADS} heads",
        ours=lambda: ops.rope(q_TND, cos_PD, sin_PD, positions_T),
        theirs=rotated,
        num_bytes=8 * q_TND.numel(),
    )


def sampling_cases(ops: Ops) -> Iterator[Case]:
    table_VH = torch.randn(VOCABULARY, HIDDEN)
    for rows in (1, 8, 32):
        logits_RV, token_ids_T = torch.randn(rows, VOCABULARY), torch.randint(VOCABULARY, (rows,))
        yield Case(
            name=f"embedding {rows} × {HIDDEN}",
            ours=lambda ids=token_ids_T: ops.embedding(ids, table_VH),  # type: ignore[misc]
            theirs=lambda ids=token_ids_T: torch.nn.functional.embedding(ids, table_VH),  # type: ignore[misc]
            num_bytes=8 * rows * HIDDEN,
        )
        yield Case(
            name=f"argmax {rows} × {VOCABULARY}",
            ours=lambda x=logits_RV: ops.argmax(x),  # type: ignore[misc]
            theirs=lambda x=logits_RV: x.argmax(-1),  # type: ignore[misc]
            num_bytes=4 * logits_RV.numel(),
        )
        yield Case(
            name=f"top 256 of {rows} × {VOCABULARY}",
            ours=lambda x=logits_RV: ops.top_k(x, 256),  # type: ignore[misc]
            theirs=lambda x=logits_RV: x.topk(256),  # type: ignore[misc]
            num_bytes=4 * logits_RV.numel(),
        )


def line(case: Case, limit: Roofline) -> report.Row:
    ours_s, theirs_s = roofline.seconds_each([case.ours, case.theirs])
    is_bound_by_memory = limit.seconds_of_memory(case) >= limit.seconds(case)
    rate = case.num_bytes if is_bound_by_memory else case.num_operations
    seen = f"{ours_s * 1e6:.0f} µs" if ours_s < 0.01 else f"{ours_s * 1e3:.1f} ms"
    return report.Row(
        what=case.name,
        seen=f"{seen}, {rate / ours_s / 1e9:.1f} {'GB/s' if is_bound_by_memory else 'G operations/s'}, "
        f"{limit.seconds(case) / ours_s:.2f} of the roofline, {theirs_s / ours_s:.2f} × torch's speed",
    )


def cases_of(isa: str, num_threads: int) -> Iterator[Case]:
    ops, int8_ops = (native.load(num_threads, isa, quantization=quantization) for quantization in ("none", "int8"))
    if ops is None or int8_ops is None:
        raise SystemExit("no native kernels here; the log says why")
    yield from linears.cases(ops, "float32")
    yield from linears.cases(int8_ops, "int8")
    yield from attention_cases(ops)
    yield from elementwise_cases(ops)
    yield from sampling_cases(ops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", default=best_isa())
    parser.add_argument("--only", default="", help="cases whose name contains it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    limit = roofline.measure(arguments.isa, arguments.threads)
    cases = (case for case in cases_of(arguments.isa, arguments.threads) if arguments.only in case.name)
    rows = [line(case, limit) for case in cases]
    report.write(
        f"ops-{arguments.isa}-{arguments.threads}",
        f"Native ops, {arguments.isa}, {arguments.threads} thread(s), beside torch {torch.__version__} in float32",
        rows,
        f"Roofline of this run: {limit}.",
    )


if __name__ == "__main__":
    main()
