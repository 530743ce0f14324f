"""What a decode step costs on the host beside the model: deciding, rows, events, and the step's layout in numpy.

    python -m benchmarks.step_overhead

Prints medians in microseconds. The model is replaced by one that answers at once.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Final

import torch

from disaggregated.engine.api import EngineRequest, RequestKind, ScheduledSequence
from disaggregated.engine.engine import LLMEngine
from disaggregated.engine.runner import step_tensors
from disaggregated.engine.speculation import Speculation
from disaggregated.sampling_params import SamplingParams

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
        num_blocks=batch_size * 64,
        block_size=BLOCK_SIZE,
        max_num_tokens=512,
        max_batch_size=batch_size,
        max_seq_len=4096,
        speculation=speculation,
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


def main() -> None:
    for batch_size in (1, 8, 32):
        for name, speculation in (
            ("", None),
            (" with drafts", Speculation(max_draft_len=4, max_matching_ngram_size=4)),
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

            sys.stdout.write(
                f"batch {batch_size:>2}{name}: engine {median_us(step):.0f} us, layout {median_us(layout):.0f} us\n"
            )


if __name__ == "__main__":
    main()
