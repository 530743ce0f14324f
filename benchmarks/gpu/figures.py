"""Measuring on a device, and keeping what was measured at once: a part that dies later does not take it along."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Final

import torch

PEAK_BYTES_PER_S: Final = 4.8e12
"""Of an H200's memory, by its datasheet."""
PEAK_FLOP_PER_S: Final = {"bfloat16": 989e12, "fp8": 1979e12}
"""Dense, by the datasheet."""


def keep(what: str, seen: str, *, share: float | None = None, of: str = "") -> None:
    figure = {"what": what, "seen": seen, **({} if share is None else {"share": share, "of": of})}
    print(figure, flush=True)
    if path := os.environ.get("DISAGG_GPU_FIGURES"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(figure) + "\n")


def seconds_each(call: Callable[[], object], *, rounds: int = 5, at_least_s: float = 0.05) -> float:
    """Median over rounds of the time of one call, by the device's clock; the device is idle before and after."""
    call()
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = max(1, int(at_least_s / (time.perf_counter() - start_s)))
    seen: list[float] = []
    for _ in range(rounds):
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        seen.append(begin.elapsed_time(end) / 1e3 / repeats)
    return statistics.median(seen)


def measured_bandwidth() -> float:
    """Bytes/s, read and written, of a copy of gigabytes."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    into = torch.empty_like(source)
    bytes_per_s = 2 * source.numel() / seconds_each(lambda: into.copy_(source))
    keep("copy on the device", f"{bytes_per_s / 1e12:.2f} TB/s", share=bytes_per_s / PEAK_BYTES_PER_S, of="4.8 TB/s")
    return bytes_per_s


def measured_flops() -> float:
    """FLOP/s of a large product of random bfloat16 matrices."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flop_per_s = 2 * 8192**3 / seconds_each(lambda: left @ right)
    peak = PEAK_FLOP_PER_S["bfloat16"]
    keep("bf16 product of 8192³", f"{flop_per_s / 1e12:.0f} TFLOP/s", share=flop_per_s / peak, of="989 TFLOP/s")
    return flop_per_s
