"""Whole systems on two cores, one after the other: ours, split and mixed, and every peer that is installed.

python -m benchmarks.systems                             everything, about 25 minutes on a quiet machine
python -m benchmarks.systems --only ours,vllm --load b   parts; a name means every system that begins with it
python -m benchmarks.systems --missing                   only what has not been measured yet, or has failed
python -m benchmarks.systems --report                    nothing but the report, from the figures there are
python -m benchmarks.systems --quick --only mixed-fp32   tries the harness out; nothing is kept

Each part has a deadline, is written to results/systems.json at once, and costs the others nothing when it fails.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import signal
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp

from benchmarks import report
from benchmarks.peers import Peers
from benchmarks.systems import plot, verdicts
from benchmarks.systems.catalogue import System, systems, two_cores
from benchmarks.systems.client import CompletionFailed
from benchmarks.systems.loads import FULL, LOADS, QUICK, Sizes, warm_up
from benchmarks.systems.results import Results
from benchmarks.systems.serving import SystemFailed, now

LIMITS_S: Final = {"warm": 180.0, "a": 120.0, "b": 240.0, "c": 180.0, "transformers": 300.0}
PLOT: Final = Path(__file__).parents[2] / "docs" / "images" / "interference.svg"
PLOTTED: Final = ("ours-fp32", "mixed-fp32", "vllm", "vllm-nixl", "llama-f32")
TRANSFORMERS: Final = "transformers"
METHOD: Final = """\
Each system alone on the machine, one after the other; the load generator shares the two cores with it. Prompts are
distinct random token ids, greedy, without EOS. a: one client, 512 tokens in, 64 out. b: 8 clients, 16 requests, 256 in,
128 out. c: 6 chats decode all the time, and a prompt of 2,048 tokens arrives every 15 s; quiet is before and after.
Raw figures: `systems.json`."""
Failure = (CompletionFailed, SystemFailed, TimeoutError, aiohttp.ClientError, OSError)
"""What a system may do to us; anything else is our own mistake."""


def say(text: str) -> None:
    print(f"{now()} {text}", flush=True)


class Run:
    """What is left to measure, and where the figures go."""

    def __init__(self, results: Results, sizes: Sizes, loads: Iterable[str], *, only_missing: bool) -> None:
        self._results = results
        self._sizes = sizes
        self._loads = list(loads)
        self._only_missing = only_missing

    def loads_of(self, system: str, possible: Sequence[str]) -> list[str]:
        wanted = [load for load in self._loads if load in possible]
        return [load for load in wanted if not self._only_missing or self._results.get(system, load) is None]

    async def measure(self, system: System, folder: Path) -> None:
        loads = self.loads_of(system.name, system.loads)
        if not loads:
            return
        say(f"{system.title}: starting")
        began_s = time.monotonic()
        try:
            async with system.start(folder) as serving, client_session() as http:
                for remark in serving.remarks:
                    say(f"{system.title}: {remark}; put right")
                async with asyncio.timeout(LIMITS_S["warm"]):
                    await warm_up(serving.target, http)
                say(f"{system.title}: ready and warm after {time.monotonic() - began_s:.0f} s")
                for load in loads:
                    await self._measure_load(system, load, serving.target, http)
        except (*Failure, ExceptionGroup) as error:
            self._failed(system.name, loads, error)

    async def _measure_load(self, system: System, load: str, target: Any, http: aiohttp.ClientSession) -> None:
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(LIMITS_S[load]):
                figures = await LOADS[load](target, http, self._sizes)
        except (*Failure, ExceptionGroup) as error:
            self._failed(system.name, [load], error)
            return
        self._results.put(system.name, load, figures)
        say(f"{system.title}: load {load} in {time.monotonic() - began_s:.0f} s: {_shown(figures)}")

    async def measure_transformers(self) -> None:
        """In a process of its own, under our own interpreter; it has no load c."""
        loads = self.loads_of(TRANSFORMERS, ("a", "b"))
        if not loads:
            return
        say("transformers: starting")
        arguments = [str(len(set(two_cores()))), json.dumps(dataclasses.asdict(self._sizes))]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.systems.transformers_generate", *arguments, stdout=asyncio.subprocess.PIPE
        )
        try:
            async with asyncio.timeout(LIMITS_S["transformers"]):
                output, _ = await process.communicate()
            found = json.loads(output.splitlines()[-1]) if output.strip() else {}
        except TimeoutError as error:
            self._failed(TRANSFORMERS, loads, error)
            return
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        for load in loads:
            if load in found:
                self._results.put(TRANSFORMERS, load, found[load])
                say(f"transformers: load {load}: {_shown(found[load])}")
            else:
                self._failed(TRANSFORMERS, [load], SystemFailed(f"exit code {process.returncode}"))

    def _failed(self, system: str, loads: Iterable[str], error: BaseException) -> None:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        words = f"{type(error).__name__}: {error}".strip(": ")[:300]
        for load in loads:
            if self._results.get(system, load) is None or not self._only_missing:
                self._results.put(system, load, {"failed": words})
            say(f"{system}: load {load} FAILED: {words}")


def client_session() -> aiohttp.ClientSession:
    """A connection for each request, as separate clients have: some servers close theirs after an answer."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=120.0)
    return aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0, force_close=True))


def _shown(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in figures.items() if isinstance(value, float))


def write_report(results: Results) -> None:
    notes = f"{verdicts.table(results)}\n\n{METHOD}"
    report.write("systems", "Whole systems on two cores, SmolLM2-135M", verdicts.rows(results), notes=notes)
    panels = [
        plot.Panel(title=verdicts.TITLES[name].strip("*"), is_ours=name.startswith(("ours", "mixed")), part=part)
        for name in PLOTTED
        if (part := results.get(name, "c")) is not None
    ]
    if panels:
        plot.write(PLOT, panels)


def chosen(found: Iterable[System], only: str | None) -> list[System]:
    words = [] if only is None else only.split(",")
    return [system for system in found if only is None or any(system.name.startswith(word) for word in words)]


async def measure_all(arguments: argparse.Namespace, results: Results) -> None:
    sizes = QUICK if arguments.quick else FULL
    run = Run(results, sizes, arguments.load.split(","), only_missing=arguments.missing)
    with tempfile.TemporaryDirectory() as scratch:
        for system in chosen(systems(Peers.found()), arguments.only):
            folder = Path(arguments.logs or scratch) / system.name
            folder.mkdir(parents=True, exist_ok=True)
            await run.measure(system, folder)
    if arguments.only is None or TRANSFORMERS in arguments.only.split(","):
        await run.measure_transformers()


async def until_told_to_stop(work: Coroutine[Any, Any, None]) -> None:
    """SIGTERM stops the system under test as Ctrl-C does: none is left behind."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await task


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.systems", description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names of systems, or how they begin, separated by commas")
    parser.add_argument("--load", default="a,b,c", help="loads, separated by commas")
    parser.add_argument("--missing", action="store_true", help="leave out what has been measured")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--quick", action="store_true", help="tiny loads, to try the harness out; nothing is kept")
    parser.add_argument("--logs", help="keep the systems' own output in this folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        results = Results(Path(scratch) / "quick.json") if arguments.quick else Results()
        if not arguments.report:
            asyncio.run(until_told_to_stop(measure_all(arguments, results)))
        if arguments.quick:
            print(verdicts.table(results))
        else:
            write_report(results)


if __name__ == "__main__":
    main()
