"""What disaggregation costs the first token: TTFT through the whole system, less the engine's own prefill.

    python -m benchmarks.first_token

One client on an idle machine, prompts of 512 tokens that share nothing. The engine's own time is taken in this process
with the same threads and chunk size, turn and turn about with the system's, so that both see the same machine; and once
more by the context server for the very request, which leaves only what lies around the engine.
"""

from __future__ import annotations

import asyncio
import pathlib
import random
import statistics
import tempfile
import time
from typing import Any, Final

import aiohttp

from benchmarks import report
from disaggregated.sampling_params import SamplingParams
from tests.support.completions import complete
from tests.support.deployment import deployed
from tests.support.oracle import OneProcess

MODEL: Final = "smollm2-135m-instruct"
NUM_TOKENS: Final = 512
NUM_RUNS: Final = 15
NUM_THREADS: Final = 1


def document() -> dict[str, Any]:
    section = {"num_instances": 1, "max_num_tokens": NUM_TOKENS, "num_threads": NUM_THREADS}
    return {"model": MODEL, "context_servers": section, "generation_servers": dict(section)}


def engine_prefill_s(oracle: OneProcess, prompt: list[int]) -> float:
    begin_s = time.perf_counter()
    oracle.generate(prompt, SamplingParams(max_tokens=1))
    return time.perf_counter() - begin_s


async def main() -> None:
    chance = random.Random(1)
    oracle = OneProcess(MODEL, max_num_tokens=NUM_TOKENS, num_threads=NUM_THREADS)
    engine, system, around = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        async with deployed(pathlib.Path(scratch), document()) as deployment, aiohttp.ClientSession() as session:
            for _ in range(NUM_RUNS + 2):
                prompt = [chance.randrange(1000, 40_000) for _ in range(NUM_TOKENS)]
                engine.append(engine_prefill_s(oracle, prompt))
                completion = await complete(session, deployment.url, prompt, max_tokens=4)
                system.append(completion.ttft_s)
                story = await deployment.get_json(f"/requests/{completion.request_id}")
                around.append(completion.ttft_s - story["ttft_parts"]["prefill_compute_s"])
    engine, system, around = engine[2:], system[2:], around[2:]
    cost_s = statistics.median(system) - statistics.median(engine)
    report.write(
        "first-token",
        f"Time to first token of a {NUM_TOKENS}-token prompt, one client",
        [
            report.Row(what="engine alone, prefill", seen=report.spread(engine, "ms", scale=1e3)),
            report.Row(what="whole system, TTFT", seen=report.spread(system, "ms", scale=1e3)),
            report.Row(what="difference of the medians", seen=f"{cost_s * 1e3:.1f} ms", bar="at most 15 ms",
                       holds=cost_s <= 0.015),
            report.Row(what="TTFT less the prefill of the same request, as its context server timed it",
                       seen=report.spread(around, "ms", scale=1e3), bar="at most 15 ms",
                       holds=statistics.median(around) <= 0.015),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    asyncio.run(main())
