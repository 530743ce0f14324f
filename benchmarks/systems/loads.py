"""The loads. Prompts are random token ids, all different, so that no prefix cache helps anybody; greedy, no EOS.

a   one client, 512 tokens in, 64 out: what the first token and an idle machine's beat cost
b   8 clients, 256 in, 128 out, 16 requests: how much a machine delivers
c   6 chats that decode all the time, and a prompt of 2,048 tokens every 15 s: what long prompts do to their beat
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import aiohttp

from benchmarks.systems.client import Target, Timeline

FIRST_ID, LAST_ID = 1000, 40_000
"""Ordinary tokens in SmolLM2's vocabulary: no control tokens, no single bytes."""
QUIET_S: Final = 10.0
RAMP_LIMIT_S: Final = 60.0
CHAT_TOKENS_MAX: Final = 6000
"""More than any chat gets to before it is hung up."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """`QUICK` is for trying the harness out; its figures mean nothing."""

    num_runs_a: int
    tokens_a: tuple[int, int]
    """In and out."""
    num_clients_b: int
    num_requests_b: int
    tokens_b: tuple[int, int]
    num_chats_c: int
    num_long_prompts_c: int
    long_prompt_tokens_c: int
    long_prompt_every_s: float
    quiet_s: float = QUIET_S


FULL: Final = Sizes(
    num_runs_a=3, tokens_a=(512, 64),
    num_clients_b=8, num_requests_b=16, tokens_b=(256, 128),
    num_chats_c=6, num_long_prompts_c=3, long_prompt_tokens_c=2048, long_prompt_every_s=15.0,
)  # fmt: skip
QUICK: Final = Sizes(
    num_runs_a=1, tokens_a=(64, 8),
    num_clients_b=2, num_requests_b=4, tokens_b=(32, 8),
    num_chats_c=2, num_long_prompts_c=1, long_prompt_tokens_c=256, long_prompt_every_s=4.0, quiet_s=2.0,
)  # fmt: skip


def prompt_of(name: str, num_tokens: int) -> list[int]:
    """The same for every system, and another one for every name."""
    chance = random.Random(name)
    return [chance.randrange(FIRST_ID, LAST_ID) for _ in range(num_tokens)]


def quantile(values: Sequence[float], fraction: float) -> float:
    """Nearest rank: a value that was really seen."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


def beat(prefix: str, gaps_s: Sequence[float]) -> dict[str, float]:
    """Inter-token latencies in ms."""
    return {
        f"{prefix}p50_ms": 1e3 * quantile(gaps_s, 0.5),
        f"{prefix}p99_ms": 1e3 * quantile(gaps_s, 0.99),
        f"{prefix}max_ms": 1e3 * max(gaps_s),
    }


async def warm_up(target: Target, http: aiohttp.ClientSession) -> None:
    """Whatever is compiled, allocated or connected at first use."""
    await target.complete(http, prompt_of("warm/0", 300), 4)
    async with asyncio.TaskGroup() as group:
        for index in range(1, 9):
            group.create_task(target.complete(http, prompt_of(f"warm/{index}", 16 + index), 8))


async def load_a(target: Target, http: aiohttp.ClientSession, sizes: Sizes) -> dict[str, Any]:
    num_in, num_out = sizes.tokens_a
    seen = [await target.complete(http, prompt_of(f"a/{run}", num_in), num_out) for run in range(sizes.num_runs_a)]
    gaps_s = [gap_s for timeline in seen for _, gap_s in timeline.gaps()]
    return {"ttft_p50_ms": 1e3 * statistics.median(timeline.ttft_s for timeline in seen), **beat("itl_", gaps_s)}


async def load_b(target: Target, http: aiohttp.ClientSession, sizes: Sizes) -> dict[str, Any]:
    """Each client sends its next request as soon as its last one is over."""
    num_in, num_out = sizes.tokens_b
    seen: list[Timeline] = []
    names = iter(range(sizes.num_requests_b))

    async def client() -> None:
        for name in names:
            seen.append(await target.complete(http, prompt_of(f"b/{name}", num_in), num_out))

    begin_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(sizes.num_clients_b):
            group.create_task(client())
    seconds = time.monotonic() - begin_s
    num_tokens = sum(timeline.num_tokens for timeline in seen)
    gaps_s = [gap_s for timeline in seen for _, gap_s in timeline.gaps()]
    return {
        "output_tokens_per_s": num_tokens / seconds,
        "ttft_p50_ms": 1e3 * statistics.median(timeline.ttft_s for timeline in seen),
        **beat("itl_", gaps_s),
        "num_tokens": num_tokens,
        "seconds": seconds,
    }


async def load_c(target: Target, http: aiohttp.ClientSession, sizes: Sizes) -> dict[str, Any]:
    """Quiet, then long prompts, then quiet again: as chats grow their steps get slower by themselves, and the quiet
    before and after together are what the loud part is compared with."""
    chats = [Timeline() for _ in range(sizes.num_chats_c)]
    async with asyncio.TaskGroup() as group:
        running = [
            group.create_task(target.follow(http, prompt_of(f"c/chat/{index}", 64), CHAT_TOKENS_MAX, chat))
            for index, chat in enumerate(chats)
        ]
        async with asyncio.timeout(RAMP_LIMIT_S):
            for chat in chats:
                await chat.has_begun.wait()
        began_s = time.monotonic()
        await asyncio.sleep(sizes.quiet_s)
        loud_s = time.monotonic()
        long_prompts = await send_long_prompts(target, http, sizes)
        calm_s = time.monotonic()
        await asyncio.sleep(sizes.quiet_s)
        ended_s = time.monotonic()
        num_alive = sum(not task.done() for task in running)
        for task in running:
            task.cancel()
    return {
        **beats_of(chats, loud=(loud_s, calm_s), whole=(began_s, ended_s)),
        "chats_left": num_alive,
        "long_prompt_ttft_p50_ms": 1e3 * statistics.median(timeline.ttft_s for timeline in long_prompts),
        "long_prompts_at_s": [timeline.start_s - began_s for timeline in long_prompts],
        "series": worst_gaps(chats, began_s, ended_s),
    }


async def send_long_prompts(target: Target, http: aiohttp.ClientSession, sizes: Sizes) -> list[Timeline]:
    """One at a fixed time each, whether or not the one before is over; 16 tokens are generated, so that they decode
    where the chats do. Returns when all are over and the last one's interval has passed."""
    async with asyncio.TaskGroup() as group:
        tasks = []
        for index in range(sizes.num_long_prompts_c):
            prompt = prompt_of(f"c/long/{index}", sizes.long_prompt_tokens_c)
            tasks.append(group.create_task(target.complete(http, prompt, 16)))
            await asyncio.sleep(sizes.long_prompt_every_s)
    return [task.result() for task in tasks]


def beats_of(
    chats: Sequence[Timeline], *, loud: tuple[float, float], whole: tuple[float, float]
) -> Mapping[str, float]:
    gaps = [gap for chat in chats for gap in chat.gaps() if whole[0] <= gap[0] <= whole[1]]
    during = [gap_s for when_s, gap_s in gaps if loud[0] <= when_s <= loud[1]]
    around = [gap_s for when_s, gap_s in gaps if not loud[0] <= when_s <= loud[1]]
    return {**beat("quiet_itl_", around), **beat("itl_", during)}


def worst_gaps(chats: Sequence[Timeline], began_s: float, ended_s: float) -> list[tuple[float, float]]:
    """For the plot: (seconds, ms), the longest gap that ended in each half second."""
    buckets: dict[int, float] = {}
    for chat in chats:
        for when_s, gap_s in chat.gaps():
            if began_s <= when_s <= ended_s:
                bucket = int(2 * (when_s - began_s))
                buckets[bucket] = max(buckets.get(bucket, 0.0), gap_s)
    return [(bucket / 2, round(1e3 * gap_s, 1)) for bucket, gap_s in sorted(buckets.items())]


LOADS: Final = {"a": load_a, "b": load_b, "c": load_c}
