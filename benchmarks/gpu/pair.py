"""One context and one generation process on one GPU, a Llama-3-8B-shaped model: TTFT, ITL, transfer.

python -m benchmarks.gpu.pair [staged]         staged: by pinned host memory, where CUDA IPC is at hand, too
"""

from __future__ import annotations

import asyncio
import pathlib
import random
import statistics
import sys
import tempfile
import time

from benchmarks.gpu import llama
from benchmarks.gpu.figures import keep
from disaggregated.sampling_params import SamplingParams
from tests.support.processes import all_running
from tests.support.server_client import ContextClient, GenerationClient

FLAGS = (
    "--load-format=dummy", "--port=0", "--device=cuda", "--max-num-tokens=4096", "--max-seq-len=8448",
    "--max-batch-size=32", "--kv-cache-config.max-tokens=140000", "--kv-cache-config.enable-block-reuse=false",
)  # fmt: skip
NUM_TOKENS = 64


async def one(
    context: ContextClient, generation: GenerationClient, length: int, seed: int
) -> tuple[float, float, float, float]:
    """(TTFT, mean ITL, seconds of the transfer, its bytes) of one request, as an orchestrator would see it."""
    chance = random.Random(seed)
    prompt = [chance.randrange(1000, 100_000) for _ in range(length)]
    sampling = SamplingParams(max_tokens=NUM_TOKENS)
    started_s = time.perf_counter()
    first_s = [0.0]

    async def prefill() -> None:
        await context.first_token(prompt, sampling, transfer_id=f"t{seed}")
        first_s[0] = time.perf_counter()

    async with asyncio.TaskGroup() as group:
        group.create_task(prefill())
        admit = group.create_task(generation.admit(prompt, sampling, source=context.ticket(f"t{seed}")))
    completion = await generation.completion(admit.result())
    ended_s = time.perf_counter()
    times = completion.times
    assert times is not None
    itl_s = (ended_s - first_s[0]) / (NUM_TOKENS - 1)
    return first_s[0] - started_s, itl_s, times.transfer_s, times.transfer_bytes


async def main(cuda_ipc: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = str(llama.write_model(pathlib.Path(folder)))
        way = f"--cache-transceiver-config.cuda-ipc={cuda_ipc}"
        commands = [["-m", f"{role}_server", model, *FLAGS, way] for role in ("context", "generation")]
        async with (
            all_running(commands, ready_timeout_s=90.0) as [context_process, generation_process],
            ContextClient(context_process.address) as context,
            GenerationClient(generation_process.address) as generation,
        ):
            keep("pair: ready", f"{context_process.ready_line}; {generation_process.ready_line}")
            await one(context, generation, 512, 0)
            links = (await generation.wait_idle()).links
            name = "pair, " + "; ".join(f"{link.transport} ({link.devices})" for link in links)
            for length in (512, 2048, 8192):
                seen = [await one(context, generation, length, length + i) for i in range(1, 4)]
                ttft, itl, transfer, size = (statistics.median(column) for column in zip(*seen, strict=True))
                keep(
                    f"{name}: prompt of {length}, {NUM_TOKENS} tokens",
                    f"TTFT {ttft * 1e3:.0f} ms, ITL {itl * 1e3:.2f} ms, "
                    f"{size / 1e6:.0f} MB in {transfer * 1e3:.1f} ms, {size / max(transfer, 1e-9) / 1e9:.1f} GB/s",
                )
            started_s = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                for i in range(16):
                    group.create_task(one(context, generation, 1024, 100_000 + i))
            seconds = time.perf_counter() - started_s
            keep(
                f"{name}: 16 prompts of 1024 at once",
                f"{16 * NUM_TOKENS / seconds:.0f} output tok/s in {seconds:.2f} s",
            )


if __name__ == "__main__":
    asyncio.run(main("false" if "staged" in sys.argv[1:] else "true"))
