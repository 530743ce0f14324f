"""What routing by cost is worth on chats of several turns, beside servers that take turns.

    python -m benchmarks.routing [--seed N] [--router TYPE] [--pull-back]

Two deployments of two context servers and one generation server that differ in `router.type` alone play the same chats
(`benchmarks/chats.py`): eight clients at once, each with a chat of its own and the time that it takes to think, so that
the turns of all chats mix as they come and prompts wait for each other. Rounds are played in both in turn, ABBA and so
on, each as often first, so that what else the machine does falls on both; caches stay as they are from round to round,
full of chats that are over.

How many rounds there are is no matter of taste. Replayed in virtual time, with servers whose speed is up to 1.6 times
as high in one round as in another, mean times to first token of one round have a ratio of 0.31 to 0.99, those of three
rounds 0.42 to 0.65, and those of six 0.46 to 0.59: prompts that wait for each other make more of a slow half minute
than it was, and the first rounds begin with empty caches.

What can be had is told beside what was: the most that any placement could find is what a cache without end would hold.
Turns taken with two servers are right every other time, and leave most chats in both caches, so that neither has room
for all. Over thirty draws of these chats, replayed with caches and nothing else, chats that never move find 1.9 times
as much as turns (1.4 to 2.3). Servers find less: prompts under way hold blocks, the more of them the longer they wait.
Blocks are not brought back from the generation server unless `--pull-back` says so: what is cached is there because it
was routed there. Brought back, turns find as much as routing does (71 % beside 67 % of these chats): one generation
server, on the same host, has room for all chats, and what lies there costs milliseconds to bring.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import pathlib
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import aiohttp

from benchmarks import chats, report
from benchmarks.chats import Chat
from tests.support.completions import complete
from tests.support.deployment import Deployment, deployed

MODEL: Final = "smollm2-135m-instruct"
TURNS: Final = "round_robin"
NUM_ROUNDS: Final = 6
"""An even number, so that each deployment is as often the first."""
NUM_CLIENTS: Final = 8
BLOCK: Final = 16
CACHE_TOKENS: Final = NUM_CLIENTS * chats.MEAN_LENGTH // 2 // BLOCK * BLOCK
"""Of one of the two context servers."""
HIT_GAIN: Final = 1.8
TTFT_SHARE: Final = 0.6
FORESEEN: Final = 0.99


def document(router: str, *, pulls_back: bool) -> dict[str, Any]:
    section: dict[str, Any] = {
        "max_num_tokens": 512,
        "max_seq_len": 2048,
        "num_threads": 1,
        "cache_transceiver_config": {"pull_back": pulls_back},
        "router": {"type": router},
    }
    cache = {"max_tokens": CACHE_TOKENS, "tokens_per_block": BLOCK}
    return {
        "model": MODEL,
        "context_servers": {**section, "kv_cache_config": cache, "num_instances": 2},
        "generation_servers": {
            **section,
            "kv_cache_config": {**cache, "max_tokens": 2 * CACHE_TOKENS},
            "num_instances": 1,
        },
    }


@dataclasses.dataclass(slots=True)
class Seen:
    """Of one deployment."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    ttft_s: list[float] = dataclasses.field(default_factory=list)
    foreseen: Counter[bool] = dataclasses.field(default_factory=Counter)
    estimate_ratios: list[float] = dataclasses.field(default_factory=list)
    round_ttft_s: list[float] = dataclasses.field(default_factory=list)
    """The mean of each round."""
    num_moved: int = 0
    """Turns that went elsewhere than where most of their prompt was."""
    answers: dict[tuple[int, ...], list[int]] = dataclasses.field(default_factory=dict)
    """By what was asked."""

    @property
    def hit(self) -> float:
        return self.num_cached_tokens / self.num_prompt_tokens

    def take(self, story: dict[str, Any], ttft_s: float) -> None:
        self.ttft_s.append(ttft_s)
        self.num_prompt_tokens += story["num_prompt_tokens"]
        self.num_cached_tokens += story["num_cached_tokens"]
        attempt = next(each for each in story["attempts"] if each["first_token_s"] is not None)
        decision = attempt["decision"]
        found = attempt["num_cached_tokens"] - attempt["num_pulled_tokens"]
        self.foreseen[decision["predicted_cached_tokens"] == found] += 1
        held = [each.get("num_cached_tokens", 0) for each in decision["candidates"]]
        self.num_moved += bool(held) and max(held) > held[0]
        if decision["predicted_ttft_s"]:
            real_s = attempt["first_token_s"] - attempt["began_s"]
            self.estimate_ratios.append(real_s / decision["predicted_ttft_s"])


class Place:
    """A deployment, and what was seen of it."""

    def __init__(self, deployment: Deployment, http: aiohttp.ClientSession) -> None:
        self._deployment = deployment
        self._http = http
        self.seen = Seen()

    async def warm_up(self) -> None:
        for number in range(4):  # Each context server measures what computing costs it.
            prompt = list(range(100 * number + 1, 100 * number + 1 + 4 * BLOCK))
            await complete(self._http, self._deployment.url, prompt, max_tokens=2)

    async def play(self, clients: Sequence[Chat]) -> None:
        num_before = len(self.seen.ttft_s)
        async with asyncio.TaskGroup() as group:
            for chat in clients:
                group.create_task(self._play(chat))
        self.seen.round_ttft_s.append(statistics.mean(self.seen.ttft_s[num_before:]))

    async def _play(self, chat: Chat) -> None:
        prompt: list[int] = []
        for turn in chat.turns:
            await asyncio.sleep(turn.thinking_s)
            prompt = [*prompt, *turn.tokens]
            answer = await complete(self._http, self._deployment.url, prompt, max_tokens=chats.ANSWER)
            self.seen.take(await self._deployment.get_json(f"/requests/{answer.request_id}"), answer.ttft_s)
            self.seen.answers[tuple(prompt)] = answer.token_ids
            prompt = [*prompt, *answer.token_ids]


async def play(rounds: Sequence[Sequence[Chat]], router: str, *, pulls_back: bool) -> dict[str, Seen]:
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession())
        places: dict[str, Place] = {}
        for each in (TURNS, router):
            scratch = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            deployment = await stack.enter_async_context(deployed(scratch, document(each, pulls_back=pulls_back)))
            places[each] = Place(deployment, http)
            await places[each].warm_up()
        order = list(places)
        for clients in rounds:
            for each in order:
                await places[each].play(clients)
            order.reverse()
        return {each: place.seen for each, place in places.items()}


def rows(turns: Seen, cost: Seen, findable: float) -> list[report.Row]:
    """findable: of the tokens of all prompts, the share that a cache without end would hold."""
    ttft_share = statistics.mean(cost.ttft_s) / statistics.mean(turns.ttft_s)
    ratios = [one / other for one, other in zip(cost.round_ttft_s, turns.round_ttft_s, strict=True)]
    foreseen = cost.foreseen[True] / cost.foreseen.total()
    equal = sum(cost.answers.get(prompt) == answer for prompt, answer in turns.answers.items())
    return [
        report.Row(
            what="prompt tokens found in a cache: round robin / by cost",
            seen=f"{turns.hit:.1%} / {cost.hit:.1%} = 1 : {cost.hit / turns.hit:.2f}",
            bar=f"at least 1 : {HIT_GAIN}",
            holds=cost.hit >= HIT_GAIN * turns.hit,
        ),
        report.Row(
            what="the most that any placement could find / round robin",
            seen=f"{findable:.1%} = 1 : {findable / turns.hit:.2f}",
        ),
        report.Row(
            what="mean TTFT by cost / round robin",
            seen=f"{statistics.mean(cost.ttft_s) * 1e3:.0f} / {statistics.mean(turns.ttft_s) * 1e3:.0f} ms "
            f"= {ttft_share:.2f}",
            bar=f"at most {TTFT_SHARE}",
            holds=ttft_share <= TTFT_SHARE,
        ),
        report.Row(
            what="the same, of one round",
            seen=report.spread(ratios, "%", scale=100),
        ),
        report.Row(
            what="median TTFT by cost / round robin",
            seen=f"{report.spread(cost.ttft_s, 'ms', scale=1e3)} / {report.spread(turns.ttft_s, 'ms', scale=1e3)}",
        ),
        report.Row(
            what="requests whose cached tokens were predicted exactly",
            seen=f"{foreseen:.1%} of {cost.foreseen.total()}",
            bar=f"at least {FORESEEN:.0%}",
            holds=foreseen >= FORESEEN,
        ),
        report.Row(
            what="turns sent elsewhere than where most of their prompt was, because that was quicker",
            seen=f"{cost.num_moved} of {len(cost.ttft_s)}",
        ),
        report.Row(what="dispatch to first token, over the estimate", seen=report.spread(cost.estimate_ratios, "")),
        report.Row(what="equal answers", seen=f"{equal} of {len(turns.answers)}"),
    ]


def findable_share(rounds: Sequence[Sequence[Chat]]) -> float:
    every = [chat for clients in rounds for chat in clients]
    return sum(chat.num_findable(BLOCK) for chat in every) / sum(sum(chat.prompt_lengths) for chat in every)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing")
    parser.add_argument("--seed", type=int, default=1, help="of the chats")
    parser.add_argument("--router", default="least_ttft", help="what is compared with taking turns")
    parser.add_argument("--pull-back", action="store_true", help="blocks come back from the generation server")
    args = parser.parse_args()
    rounds = chats.rounds(args.seed, num_rounds=NUM_ROUNDS, num_clients=NUM_CLIENTS)
    seen = asyncio.run(play(rounds, args.router, pulls_back=args.pull_back))
    is_usual = args.router == "least_ttft" and not args.pull_back
    report.write(
        "routing" if is_usual else f"routing-{args.router}{'-pull-back' if args.pull_back else ''}",
        f"Chats of several turns over two context servers: {args.router} beside round robin",
        rows(seen[TURNS], seen[args.router], findable_share(rounds)),
        f"{NUM_ROUNDS} rounds of {NUM_CLIENTS} clients at once, chats drawn from seed {args.seed}; the caches of both "
        f"context servers hold {2 * CACHE_TOKENS} tokens, as many as {NUM_CLIENTS} chats that are half over. "
        "A thread a server.",
    )


if __name__ == "__main__":
    main()
