"""What a chat's next turn costs, with and without bringing its earlier turns back to the context server.

    python -m benchmarks.multi_turn

Two deployments of two context servers and one generation server run side by side; one of them pulls back. Context
servers take turns, so that each turn of a chat comes to one that has not seen the last. Chats are played in both turn
and turn about, so that both see the same machine, with the same tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import random
import statistics
import tempfile
from collections import Counter, defaultdict
from typing import Any, Final

import aiohttp

from benchmarks import report
from tests.support.completions import complete
from tests.support.deployment import Deployment, deployed

MODEL: Final = "smollm2-135m-instruct"
NUM_CHATS: Final = 5
NUM_TURNS: Final = 4
FIRST_TURN: Final = 400
"""Tokens; a later turn has 60, an answer as many."""
LATER_TURN: Final = 60
ANSWER: Final = 60
BLOCK: Final = 32
LEAST_GAIN: Final = 1.5
READING_S: Final = 0.3
"""Between an answer and the next turn; a person takes longer."""


def document(*, pull_back: bool) -> dict[str, Any]:
    section: dict[str, Any] = {
        "max_num_tokens": 512,
        "num_threads": 1,
        "kv_cache_config": {"max_tokens": 32_768, "tokens_per_block": BLOCK},
        "cache_transceiver_config": {"pull_back": pull_back},
    }
    return {
        "model": MODEL,
        "context_servers": {**section, "num_instances": 2, "router": {"type": "round_robin"}},
        "generation_servers": {**section, "num_instances": 1},
    }


class Chat:
    """One conversation, played in each deployment: what is said does not depend on where."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self.tokens = self._say(FIRST_TURN)

    def _say(self, num_tokens: int) -> list[int]:
        return [self._dice.randrange(1000, 40_000) for _ in range(num_tokens)]

    def goes_on(self, answer: list[int]) -> None:
        self.tokens = [*self.tokens, *answer, *self._say(LATER_TURN)]


class Measured:
    """What was seen of every turn."""

    def __init__(self) -> None:
        self.ttft_s: dict[tuple[bool, int], list[float]] = defaultdict(list)
        self.hint_s: list[float] = []
        self.verdicts: Counter[str] = Counter()


async def play(chat: Chat, places: dict[bool, Deployment], session: aiohttp.ClientSession, measured: Measured) -> None:
    for turn in range(NUM_TURNS):
        answers = []
        for pulls_back, deployment in places.items():
            answer = await complete(session, deployment.url, chat.tokens, max_tokens=ANSWER)
            answers.append(answer.token_ids)
            measured.ttft_s[pulls_back, turn].append(answer.ttft_s)
            if pulls_back and turn:
                (attempt,) = (await deployment.get_json(f"/requests/{answer.request_id}"))["attempts"]
                measured.verdicts[attempt["reuse_verdict"] or "no hint"] += 1
                measured.hint_s.append(attempt["reuse_s"])
        assert answers[0] == answers[1], "tokens depend on where a chat's blocks come from"
        await asyncio.sleep(READING_S)
        chat.goes_on(answers[0])


async def main() -> None:
    measured = Measured()
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        places: dict[bool, Deployment] = {}
        for pulls_back in (False, True):
            scratch = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            places[pulls_back] = await stack.enter_async_context(deployed(scratch, document(pull_back=pulls_back)))
            for seed in (-1, -2):  # Each context server measures what computing costs it.
                await complete(session, places[pulls_back].url, Chat(seed).tokens, max_tokens=2)
        for seed in range(NUM_CHATS):
            await play(Chat(seed), places, session, measured)
    write(measured)


def write(measured: Measured) -> None:
    rows = []
    for turn in range(NUM_TURNS):
        num_tokens = FIRST_TURN + turn * (LATER_TURN + ANSWER)
        both = {pulls_back: measured.ttft_s[pulls_back, turn] for pulls_back in (False, True)}
        ratio = statistics.median(both[False]) / statistics.median(both[True])
        seen = {pulls_back: report.spread(values, "ms", scale=1e3) for pulls_back, values in both.items()}
        rows.append(
            report.Row(
                what=f"turn {turn + 1}, {num_tokens} tokens: TTFT without / with it",
                seen=f"{seen[False]} / {seen[True]} = {ratio:.2f}",
                bar=f"at least {LEAST_GAIN}" if turn else "",
                holds=ratio >= LEAST_GAIN if turn else None,
            )
        )
    verdicts = ", ".join(f"{verdict} {count}" for verdict, count in measured.verdicts.most_common())
    rows.append(report.Row(what="hints of later turns: what became of them", seen=verdicts))
    rows.append(report.Row(what="and what they took", seen=report.spread(measured.hint_s, "ms", scale=1e3)))
    report.write(
        "multi-turn",
        "TTFT of a chat's next turn, without and with bringing its blocks back from where they were decoded",
        rows,
        "One client; in each deployment two context servers that take turns and one generation server, a thread each. "
        "Both give the same tokens.",
    )


if __name__ == "__main__":
    asyncio.run(main())
