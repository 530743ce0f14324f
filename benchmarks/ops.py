"""How fast each native op is, beside torch and beside what the machine can do at all.

python -m benchmarks.ops [--threads 1] [--isa avx2]

Shapes are SmolLM2-135M's. Rooflines are measured in the same run: DRAM by summing a large tensor, arithmetic by torch's
own product of large matrices. Weights are taken in turn from copies that together are larger than any cache, because in
a model no layer finds its weights in a cache. Time is the median over rounds in which native and torch take turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch

from benchmarks import report
from disaggregated.engine.ops import native
from disaggregated.engine.ops.api import AttentionBatch, AttentionSpec, LayerPool, Ops

HIDDEN, FFN, VOCABULARY = 576, 1536, 49152
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 9, 3, 64, 32
COLD_BYTES: Final = 256 << 20
ROUND_S: Final = 0.05
NUM_ROUNDS: Final = 7

Call = Callable[[], object]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One op at one size. `ours` and `theirs` do the same work."""

    name: str
    ours: Call
    theirs: Call
    num_bytes: float = 0.0
    """That must come from DRAM."""
    flops: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    bytes_per_s: float
    flops_per_s: float

    def seconds(self, case: Case) -> float:
        """The least time that `case` can take here."""
        return max(case.num_bytes / self.bytes_per_s, case.flops / self.flops_per_s)


def seconds_each(calls: Sequence[Call]) -> list[float]:
    """Median seconds of each, taken in turns so that a noisy neighbour hits all of them."""
    rounds: list[list[float]] = [[] for _ in calls]
    repeats = [max(1, int(ROUND_S / _seconds(call, 1))) for call in calls]
    for _ in range(NUM_ROUNDS):
        for call, repeat, seen in zip(calls, repeats, rounds, strict=True):
            seen.append(_seconds(call, repeat))
    return [statistics.median(seen) for seen in rounds]


def _seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def measure_roofline() -> Roofline:
    large, square = torch.ones(COLD_BYTES // 4), torch.randn(1536, 1536)
    large_s, square_s = seconds_each([large.sum, lambda: square @ square])
    return Roofline(bytes_per_s=COLD_BYTES / large_s, flops_per_s=2 * 1536**3 / square_s)


def linear_cases(ops: Ops) -> Iterator[Case]:
    shapes = {"qkv": (960, HIDDEN), "gate_up": (2 * FFN, HIDDEN), "down": (HIDDEN, FFN), "head": (VOCABULARY, HIDDEN)}
    for name, (num_columns, depth) in shapes.items():
        weight_bytes = 4 * num_columns * depth
        weights = [torch.randn(num_columns, depth) for _ in range(1 + COLD_BYTES // weight_bytes)]
        packed = [ops.prepare_linear(weight, None) for weight in weights]
        for rows in (1, 8, 32) if name == "head" else (1, 8, 32, 128, 512):
            yield linear_case(ops, f"linear {name} {rows} × {depth} → {num_columns}", rows, weights, packed)


def linear_case(ops: Ops, name: str, rows: int, weights: list[torch.Tensor], packed: list[object]) -> Case:
    num_columns, depth = weights[0].shape
    x_TK = torch.randn(rows, depth)
    ours, theirs = itertools.cycle(packed), itertools.cycle(weights)
    return Case(
        name=name,
        ours=lambda: ops.linear(x_TK, next(ours)),
        theirs=lambda: torch.nn.functional.linear(x_TK, next(theirs)),
        num_bytes=4 * num_columns * depth,
        flops=2 * rows * num_columns * depth,
    )


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
        flops=4 * rows * seen * NUM_HEADS * HEAD_DIM,
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


def line(case: Case, roofline: Roofline) -> report.Row:
    ours_s, theirs_s = seconds_each([case.ours, case.theirs])
    by_bytes = case.num_bytes / roofline.bytes_per_s >= case.flops / roofline.flops_per_s
    rate = f"{case.num_bytes / ours_s / 1e9:.1f} GB/s" if by_bytes else f"{case.flops / ours_s / 1e9:.0f} GFLOP/s"
    share = roofline.seconds(case) / ours_s
    return report.Row(
        what=case.name,
        seen=f"{ours_s * 1e6:.0f} µs, {rate}, {share:.2f} of the roofline, {theirs_s / ours_s:.2f} × torch's speed",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", default=None)
    parser.add_argument("--only", default="", help="cases whose name begins so")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ops = native.load(arguments.threads, arguments.isa)
    if ops is None:
        raise SystemExit("no native kernels here; the log says why")
    roofline = measure_roofline()
    cases = itertools.chain(linear_cases(ops), attention_cases(ops), elementwise_cases(ops))
    rows = [line(case, roofline) for case in cases if case.name.startswith(arguments.only)]
    report.write(
        f"ops-{ops.name}-{arguments.threads}",
        f"Native ops, {ops.name}, {arguments.threads} thread(s), float32, beside torch {torch.__version__}",
        rows,
        f"Roofline of this run: DRAM {roofline.bytes_per_s / 1e9:.1f} GB/s, "
        f"matrix product {roofline.flops_per_s / 1e9:.0f} GFLOP/s.",
    )


if __name__ == "__main__":
    main()
