"""Cases of `benchmarks.ops`: linears, one by one and as all that a step of SmolLM2-135M has, in float32 and int8.

Weights are taken in turn from copies that together are larger than any cache, because in a model no layer finds its
weights in a cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch

from benchmarks.roofline import Arithmetic, Case
from disaggregated.engine.ops.api import Ops

HIDDEN, FFN, VOCABULARY, NUM_LAYERS = 576, 1536, 49152, 30
LAYER: Final = {"qkv": (960, HIDDEN), "out": (HIDDEN, HIDDEN), "gate_up": (2 * FFN, HIDDEN), "down": (HIDDEN, FFN)}
HEAD: Final = (VOCABULARY, HIDDEN)
COLD_BYTES: Final = 256 << 20
DECODE_ROWS: Final = (1, 8, 32)
PREFILL_ROWS: Final = (128, 512)

Weights = Sequence[tuple[torch.Tensor, Any]]
"""As torch takes them and as our table does."""


def cases(ops: Ops, arithmetic: Arithmetic) -> Iterator[Case]:
    for name, shape in (*LAYER.items(), ("head", HEAD)):
        num_copies = 1 + COLD_BYTES // _num_bytes(shape, arithmetic)
        weights = prepared(ops, [shape] * min(num_copies, 100))
        for rows in DECODE_ROWS if name == "head" else DECODE_ROWS + PREFILL_ROWS:
            yield one_linear(ops, f"{name} {rows} × {shape[1]} → {shape[0]}", rows, weights, arithmetic)
    yield from whole_steps(ops, arithmetic)


def whole_steps(ops: Ops, arithmetic: Arithmetic) -> Iterator[Case]:
    """Of a prefill, the head is not part: one token needs it."""
    weights = prepared(ops, list(LAYER.values()) * NUM_LAYERS + [HEAD])
    for rows in DECODE_ROWS:
        yield step(ops, f"{len(weights)} matrices of a decode step, batch {rows}", rows, weights, arithmetic)
    for rows in PREFILL_ROWS:
        yield step(ops, f"{len(weights) - 1} matrices of a prefill of {rows}", rows, weights[:-1], arithmetic)


def prepared(ops: Ops, shapes: Sequence[tuple[int, int]]) -> Weights:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    return [(weight, ops.prepare_linear(weight, None)) for weight in weights]


def one_linear(ops: Ops, name: str, rows: int, weights: Weights, arithmetic: Arithmetic) -> Case:
    shape = (weights[0][0].shape[0], weights[0][0].shape[1])
    x_TK = torch.randn(rows, shape[1])
    ours, theirs = itertools.cycle(weights), itertools.cycle(weights)
    return Case(
        name=f"linear {arithmetic}, {name}",
        ours=lambda: ops.linear(x_TK, next(ours)[1]),
        theirs=lambda: torch.nn.functional.linear(x_TK, next(theirs)[0]),
        num_bytes=_num_bytes(shape, arithmetic),
        num_operations=2 * rows * shape[0] * shape[1],
        arithmetic=arithmetic,
    )


def step(ops: Ops, name: str, rows: int, weights: Weights, arithmetic: Arithmetic) -> Case:
    inputs = {depth: torch.randn(rows, depth) for depth in (HIDDEN, FFN)}

    def ours() -> None:
        for weight_MK, weight in weights:
            ops.linear(inputs[weight_MK.shape[1]], weight)

    def theirs() -> None:
        for weight_MK, _ in weights:
            torch.nn.functional.linear(inputs[weight_MK.shape[1]], weight_MK)

    shapes = [(weight.shape[0], weight.shape[1]) for weight, _ in weights]
    return Case(
        name=f"linear {arithmetic}, all {name}",
        ours=ours,
        theirs=theirs,
        num_bytes=sum(_num_bytes(shape, arithmetic) for shape in shapes),
        num_operations=sum(2 * rows * num_columns * depth for num_columns, depth in shapes),
        arithmetic=arithmetic,
    )


def _num_bytes(shape: tuple[int, int], arithmetic: Arithmetic) -> int:
    return shape[0] * shape[1] * (1 if arithmetic == "int8" else 4)
