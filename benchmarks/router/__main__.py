"""What the front door costs, beside the routers of the field: CPU, time to the first token, memory.

    python -m benchmarks.router             about five minutes; the routers come from `python -m benchmarks.peers`
    python -m benchmarks.router --quick     tries the harness out; its figures mean nothing
    python -m benchmarks.router --only ours sglang-router --loads request token

Each router is one process on one core, in front of two context and two generation servers that only pretend; mocks and
clients have the other cores. Ours speaks our protocol to its servers, renders, tokenizes and detokenizes; the others
pass HTTP on. The loads take turns, so that a ratio is of figures taken within the same minute.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

import uvloop

from benchmarks import report
from benchmarks.router import loads
from benchmarks.router.contenders import NGINX, OURS, SGLANG, VLLM, Contender, Cores, contenders
from benchmarks.router.verdicts import Measured, rows

NAMES: Final = (OURS, SGLANG, VLLM, NGINX)
Load = Callable[[Contender, loads.Sizes], Coroutine[Any, Any, dict[str, float]]]


async def request_load(contender: Contender, sizes: loads.Sizes) -> dict[str, float]:
    message = contender.chat(loads.SHORT_TOKENS, stream=False)
    figures = {"request_us": await loads.request_cost_us(contender, message, sizes)}
    if contender.name == OURS:
        message = contender.of_token_ids(loads.SHORT_TOKENS, loads.short_prompt())
        figures["request_ids_us"] = await loads.request_cost_us(contender, message, sizes)
    return figures


async def stream_request_load(contender: Contender, sizes: loads.Sizes) -> dict[str, float]:
    message = contender.chat(loads.SHORT_TOKENS, stream=True)
    return {"stream_request_us": await loads.request_cost_us(contender, message, sizes)}


async def token_load(contender: Contender, sizes: loads.Sizes) -> dict[str, float]:
    return {"token_us": await loads.token_cost_us(contender, sizes)}


async def first_token_load(contender: Contender, sizes: loads.Sizes) -> dict[str, float]:
    return {"ttft_ms": 1e3 * await loads.first_token_s(contender, sizes)}


async def crowd_load(contender: Contender, sizes: loads.Sizes) -> dict[str, float]:
    crowd = await loads.crowd(contender, sizes)
    return {
        "crowd_errors": crowd.num_errors,
        "crowd_ttft_ms": 1e3 * crowd.ttft_s,
        "crowd_token_us": crowd.token_us,
        "crowd_grown_mb": crowd.grown_bytes / 1e6,
    }


async def slow_load(contender: Contender, sizes: loads.Sizes) -> dict[str, float]:
    slow = await loads.slow_client(contender, sizes)
    figures = {"slow_grown_mb": slow.grown_bytes / 1e6}
    return figures if slow.noticed_s is None else {**figures, "slow_noticed_ms": 1e3 * slow.noticed_s}


async def disconnect_load(contender: Contender, sizes: loads.Sizes) -> dict[str, float]:
    seconds = await loads.disconnects_s(contender, sizes)
    return {
        "noticed_ms": 1e3 * max(seconds, default=float("inf")),
        "not_noticed": sizes.num_disconnects - len(seconds),
    }


LOADS: Final[dict[str, Load]] = {
    "request": request_load,
    "stream_request": stream_request_load,
    "token": token_load,
    "first_token": first_token_load,
    "disconnect": disconnect_load,
    "crowd": crowd_load,
    "slow": slow_load,
}
"""Those that leave memory behind come last."""
ONCE: Final = ("crowd", "slow")
"""A second time, memory that was grown is used again, and nothing grows."""


async def measure(names: Sequence[str], chosen: Sequence[str], sizes: loads.Sizes, num_rounds: int) -> Measured:
    found: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    async with contenders(names, Cores.of_this_machine()) as running:
        for number in range(num_rounds):
            for load in chosen:
                if load in ONCE and number + 1 < num_rounds:
                    continue
                for contender in running:
                    for figure, value in (await LOADS[load](contender, sizes)).items():
                        found[contender.name, figure].append(value)
                        print(f"{contender.name:>14} {figure:<18} {value:10.2f}", flush=True)
    return {key: statistics.median(values) for key, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="The front door beside the routers of the field.")
    parser.add_argument("--quick", action="store_true", help="short loads, one round; nothing is kept")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help="; ".join(NAMES))
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=[*LOADS], metavar="LOAD", help="; ".join(LOADS))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    sizes, num_rounds = (loads.QUICK, 1) if arguments.quick else (loads.FULL, arguments.rounds)
    measured = uvloop.run(measure(arguments.only, arguments.loads, sizes, num_rounds))
    table = rows(measured, arguments.only)
    if arguments.quick or len(arguments.only) < len(NAMES) or len(arguments.loads) < len(LOADS):
        print(*table, sep="\n")
    else:
        report.write("router", "The front door beside other routers", table, __doc__ or "")


if __name__ == "__main__":
    main()
