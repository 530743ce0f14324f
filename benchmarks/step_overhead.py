"""What a decode step costs on the host beside the kernels.

    python -m benchmarks.step_overhead

Twice: parts of the host's work around a model that answers at once (deciding, rows and events; the step's layout in
numpy), and all of it around the real model, where whatever is not inside a native kernel counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch

from benchmarks import report
from benchmarks.engines.measurement import CONTEXT_LEN, DECODE_STEPS
from benchmarks.engines.ours import make_engine, requests
from disaggregated.engine.api import EngineRequest, RequestKind, ScheduledSequence
from disaggregated.engine.engine import LLMEngine
from disaggregated.engine.engine_limits import EngineLimits, EngineOptions
from disaggregated.engine.ops.native import NativeOps
from disaggregated.engine.speculation import Speculation
from disaggregated.engine.step_layout import step_tensors
from disaggregated.sampling_params import SamplingParams

MODEL: Final = "smollm2-135m-instruct"
NUM_STEPS: Final = 300
PROMPT_TOKENS: Final = 512
BLOCK_SIZE: Final = 32


class InstantRunner:
    """Implements `ModelRunner`; keeps the last batch."""

    def __init__(self) -> None:
        self.batch: Sequence[ScheduledSequence] = ()
        self.seconds = 0.0

    def execute(self, batch: Sequence[ScheduledSequence]) -> Sequence[Sequence[int]]:
        started_s = time.perf_counter()
        self.batch = batch
        sampled = [[] if row.sampling is None else [row.first_position % 97] for row in batch]
        self.seconds = time.perf_counter() - started_s
        return sampled


def median_us(measure: Callable[[], float]) -> float:
    return 1e6 * statistics.median(measure() for _ in range(NUM_STEPS))


def decoding_engine(runner: InstantRunner, batch_size: int, speculation: Speculation | None) -> LLMEngine:
    engine = LLMEngine(
        runner,
        EngineLimits(
            num_blocks=batch_size * 64,
            block_size=BLOCK_SIZE,
            max_num_tokens=512,
            max_batch_size=batch_size,
            max_seq_len=4096,
        ),
        EngineOptions(speculation=speculation),
    )
    for number in range(batch_size):
        prompt = [(number * 7919 + position * 31) % 49_000 for position in range(PROMPT_TOKENS)]
        sampling = SamplingParams(max_tokens=3000)
        engine.submit(
            EngineRequest(request_id=f"r{number}", kind=RequestKind.FULL, token_ids=prompt, sampling=sampling)
        )
    while engine.statistics().num_waiting or engine.statistics().num_waiting_tokens:
        engine.step()
    return engine


def host_rows() -> Iterator[report.Row]:
    """The engine's and the layout's microseconds around an instant model."""
    for batch_size in (1, 8, 32):
        for name, speculation in (
            ("", None),
            (", with drafts", Speculation(max_draft_len=4, max_matching_ngram_size=4)),
        ):
            runner = InstantRunner()
            engine = decoding_engine(runner, batch_size, speculation)

            def step(engine: LLMEngine = engine, runner: InstantRunner = runner) -> float:
                started_s = time.perf_counter()
                engine.step()
                return time.perf_counter() - started_s - runner.seconds

            def layout(runner: InstantRunner = runner) -> float:
                started_s = time.perf_counter()
                step_tensors(runner.batch, BLOCK_SIZE, torch.device("cpu"))
                return time.perf_counter() - started_s

            yield report.Row(
                what=f"batch {batch_size}{name}: scheduler, rows and events; layout of the step",
                seen=f"{median_us(step):.0f} µs; {median_us(layout):.0f} µs",
            )


class KernelTime:
    """Seconds spent in functions of a native library, once it is put in front of them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def stand_in(self, owner: object, name: str) -> None:
        """In place of `owner.name` from now on."""
        function = getattr(owner, name)

        def call(*arguments: object) -> object:
            started_s = time.perf_counter()
            result = function(*arguments)
            self.seconds += time.perf_counter() - started_s
            return result

        setattr(owner, name, call)


def real_row(precision: str, batch_size: int) -> report.Row:
    """What of a step of the bundled model is not spent in kernels."""
    engine = make_engine(MODEL, precision, threads=1)
    model = engine._steps._runner._model  # type: ignore[attr-defined]
    if not isinstance(model.ops, NativeOps):
        return report.Row(what=f"{precision}, batch {batch_size}", seen=f"no native kernels here: {model.ops.name}")
    kernels = KernelTime()
    kernels.stand_in(model.decode, "_run")
    for request in requests(RequestKind.FROM_REMOTE, batch_size, CONTEXT_LEN, DECODE_STEPS + 8, 1):
        engine.reserve(request)
        engine.admit(request.request_id, first_token=1000)
    outside: list[float] = []
    for _ in range(DECODE_STEPS):
        kernels.seconds, started_s = 0.0, time.perf_counter()
        engine.step()
        outside.append(time.perf_counter() - started_s - kernels.seconds)
    return report.Row(
        what=f"{precision}, batch {batch_size}: a step of the bundled model, outside of kernels",
        seen=report.spread(outside, "ms", scale=1e3),
        bar="at most 1 ms" if batch_size == 8 else "",
        holds=statistics.median(outside) <= 1e-3 if batch_size == 8 else None,
    )


def main() -> None:
    real = [real_row(precision, batch_size) for precision in ("float32", "int8") for batch_size in (1, 8, 32)]
    report.write("step-overhead", "A decode step beside its kernels", [*real, *host_rows()])


if __name__ == "__main__":
    main()
