"""What pulling chunks while the next one computes hides: exposed transfer time of a 1,500-token prompt, both ways.

    python -m benchmarks.overlap

Exposed is from the last publication received to the last block verified: the wait that prefill did not cover. The two
ways take turns on two deployments that run side by side and are used one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import random
import statistics
import tempfile
from typing import Any, Final

import aiohttp

from benchmarks import report
from tests.support.completions import complete
from tests.support.deployment import Deployment, deployed

MODEL: Final = "smollm2-135m-instruct"
NUM_TOKENS: Final = 1500
CHUNK_SIZE: Final = 256
NUM_RUNS: Final = 7
TRANSPORTS: Final = ("TCP", "SHM")


def document(transport: str) -> dict[str, Any]:
    section = {
        "num_instances": 1,
        "max_num_tokens": CHUNK_SIZE,
        "cache_transceiver_config": {"backend": transport},
    }
    return {"model": MODEL, "perf_metrics_max_requests": 100, "context_servers": section,
            "generation_servers": dict(section)}  # fmt: skip


async def attempt_of_one(session: aiohttp.ClientSession, deployment: Deployment, prompt: list[int]) -> dict[str, Any]:
    """Send one prompt and return what the story says of its only attempt."""
    completion = await complete(session, deployment.url, prompt, max_tokens=4)
    story = await deployment.get_json(f"/requests/{completion.request_id}")
    (attempt,) = story["attempts"]
    assert attempt["transfer_bytes"] > 0, f"nothing travelled: {attempt}"
    return dict(attempt)


async def measure(transport: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The attempts with overlap and the attempts with the transfer after the prefill."""
    chance = random.Random(2)
    both: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    async with contextlib.AsyncExitStack() as stack:
        folders = [pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in both]
        session = await stack.enter_async_context(aiohttp.ClientSession())
        deployments = [
            await stack.enter_async_context(
                deployed(folder, document(transport), environ={"TRTLLM_DISABLE_KV_CACHE_TRANSFER_OVERLAP": disabled})
            )
            for folder, disabled in zip(folders, ("0", "1"), strict=True)
        ]
        for _ in range(NUM_RUNS + 1):
            for deployment, attempts in zip(deployments, both, strict=True):
                prompt = [chance.randrange(1000, 40_000) for _ in range(NUM_TOKENS)]
                attempts.append(await attempt_of_one(session, deployment, prompt))
    return both[0][1:], both[1][1:]


async def main() -> None:
    rows = []
    for transport in TRANSPORTS:
        with_overlap, without = await measure(transport)
        exposed = [[attempt["exposed_s"] for attempt in attempts] for attempts in (with_overlap, without)]
        ratio = statistics.median(exposed[0]) / statistics.median(exposed[1])
        mib = with_overlap[0]["transfer_bytes"] / 2**20
        for way, seconds in zip(("pulled while computing", "pulled after prefill"), exposed, strict=True):
            rows.append(report.Row(what=f"{transport}, {way}: exposed", seen=report.spread(seconds, "ms", scale=1e3)))
        what = f"{transport}, ratio of the medians ({mib:.0f} MiB)"
        rows.append(report.Row(what=what, seen=f"{ratio:.2f}", bar="under 1", holds=ratio < 1))
    title = f"Exposed transfer time of a {NUM_TOKENS}-token prompt in chunks of {CHUNK_SIZE}"
    report.write("overlap", title, rows)


if __name__ == "__main__":
    asyncio.run(main())
