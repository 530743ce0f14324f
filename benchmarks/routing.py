"""What routing by cost is worth on chats of several turns, beside servers that take turns.

    python -m benchmarks.routing

Two deployments of two context servers and one generation server run side by side and differ in `router.type` alone.
The caches of two context servers hold all chats between them, and not each chat twice. Chats are played turn by turn in
both deployments, in an order that is drawn once, so that both see the same machine, with the same tokens. Blocks are
not brought back from the generation server: what is cached is there because it was routed there.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pathlib
import random
import statistics
import tempfile
from collections import Counter
from typing import Any, Final

import aiohttp

from benchmarks import report
from tests.support.completions import complete
from tests.support.deployment import Deployment, deployed

MODEL: Final = "smollm2-135m-instruct"
ROUTERS: Final = ("round_robin", "least_ttft")
NUM_CHATS: Final = 8
NUM_TURNS: Final = 4
FIRST_TURN: Final = 480
"""Tokens; a later turn has 32, an answer 8."""
LATER_TURN: Final = 32
ANSWER: Final = 8
BLOCK: Final = 32
CACHE_TOKENS: Final = 2688
"""Of one context server: 84 blocks. At its end a chat has 18, so all of them have 144."""
HIT_GAIN: Final = 1.8
TTFT_SHARE: Final = 0.6
FORESEEN: Final = 0.99


def document(router: str) -> dict[str, Any]:
    section: dict[str, Any] = {
        "max_num_tokens": 512,
        "max_seq_len": 2048,
        "num_threads": 1,
        "kv_cache_config": {"max_tokens": CACHE_TOKENS, "tokens_per_block": BLOCK},
        "cache_transceiver_config": {"pull_back": False},
        "router": {"type": router},
    }
    return {
        "model": MODEL,
        "context_servers": {**section, "num_instances": 2},
        "generation_servers": {**section, "num_instances": 1},
    }


@dataclasses.dataclass(slots=True)
class Seen:
    """Of one deployment."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    ttft_s: list[float] = dataclasses.field(default_factory=list)
    foreseen: Counter[bool] = dataclasses.field(default_factory=Counter)
    estimate_ratios: list[float] = dataclasses.field(default_factory=list)

    @property
    def hit(self) -> float:
        return self.num_cached_tokens / self.num_prompt_tokens

    def take(self, story: dict[str, Any], ttft_s: float) -> None:
        self.ttft_s.append(ttft_s)
        self.num_prompt_tokens += story["num_prompt_tokens"]
        self.num_cached_tokens += story["num_cached_tokens"]
        (attempt,) = story["attempts"]
        decision = attempt["decision"]
        self.foreseen[decision["predicted_cached_tokens"] == attempt["num_cached_tokens"]] += 1
        if decision["predicted_ttft_s"]:
            real_s = attempt["first_token_s"] - attempt["began_s"]
            self.estimate_ratios.append(real_s / decision["predicted_ttft_s"])


class Trace:
    """The chats, and in which order their turns come."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self.chats = [self._say(FIRST_TURN) for _ in range(NUM_CHATS)]
        self.order = [number for number in range(NUM_CHATS) for _ in range(NUM_TURNS)]
        self._dice.shuffle(self.order)

    def _say(self, num_tokens: int) -> list[int]:
        return [self._dice.randrange(1000, 40_000) for _ in range(num_tokens)]

    def goes_on(self, number: int, answer: list[int]) -> None:
        self.chats[number] = [*self.chats[number], *answer, *self._say(LATER_TURN)]


async def play(trace: Trace, places: dict[str, Deployment], session: aiohttp.ClientSession) -> dict[str, Seen]:
    seen = {router: Seen() for router in places}
    for number in trace.order:
        answers = []
        for router, deployment in places.items():
            answer = await complete(session, deployment.url, trace.chats[number], max_tokens=ANSWER)
            answers.append(answer.token_ids)
            seen[router].take(await deployment.get_json(f"/requests/{answer.request_id}"), answer.ttft_s)
        assert answers[0] == answers[1], "tokens depend on the routing"
        trace.goes_on(number, answers[0])
    return seen


async def main() -> None:
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        places: dict[str, Deployment] = {}
        for router in ROUTERS:
            scratch = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            places[router] = await stack.enter_async_context(deployed(scratch, document(router)))
            for _ in range(2):  # Each context server measures what computing costs it.
                await complete(session, places[router].url, Trace(-1).chats[0][:BLOCK], max_tokens=2)
        write(await play(Trace(1), places, session))


def write(seen: dict[str, Seen]) -> None:
    turns, cost = seen["round_robin"], seen["least_ttft"]
    ttft_share = statistics.mean(cost.ttft_s) / statistics.mean(turns.ttft_s)
    foreseen = cost.foreseen[True] / cost.foreseen.total()
    times = {router: report.spread(each.ttft_s, "ms", scale=1e3) for router, each in seen.items()}
    rows = [
        report.Row(
            what="prompt tokens found in a cache: round robin / by cost",
            seen=f"{turns.hit:.1%} / {cost.hit:.1%} = 1 : {cost.hit / turns.hit:.2f}",
            bar=f"at least 1 : {HIT_GAIN}",
            holds=cost.hit >= HIT_GAIN * turns.hit,
        ),
        report.Row(
            what="mean TTFT by cost / round robin",
            seen=f"{statistics.mean(cost.ttft_s) * 1e3:.1f} / {statistics.mean(turns.ttft_s) * 1e3:.1f} ms "
            f"= {ttft_share:.2f}",
            bar=f"at most {TTFT_SHARE}",
            holds=ttft_share <= TTFT_SHARE,
        ),
        report.Row(what="median TTFT by cost / round robin", seen=f"{times['least_ttft']} / {times['round_robin']}"),
        report.Row(
            what="requests whose cached tokens were predicted exactly",
            seen=f"{foreseen:.1%} of {cost.foreseen.total()}",
            bar=f"at least {FORESEEN:.0%}",
            holds=foreseen >= FORESEEN,
        ),
        report.Row(
            what="dispatch to first token, over the estimate",
            seen=report.spread(cost.estimate_ratios, ""),
        ),
    ]
    report.write(
        "routing",
        "Chats of several turns over two context servers: routing by cost beside round robin",
        rows,
        f"{NUM_CHATS} chats of {NUM_TURNS} turns, one client; a thread a server. Both give the same tokens.",
    )


if __name__ == "__main__":
    asyncio.run(main())
