"""From `disaggregated -c configs/quickstart.yml` to the first 200 of /health, what the orchestrator weighs, and how
long one server alone takes from its process's start to its ready line.

python -m benchmarks.start
"""

from __future__ import annotations

import asyncio
import os
import pathlib
import statistics
import tempfile
import time
from typing import Any, Final

import psutil
import yaml

from benchmarks import report
from tests.support.deployment import ROOT, Deployment, deployed, started
from tests.support.processes import running

MODEL: Final = "smollm2-135m-instruct"
DTYPES: Final = ("float32", "int8")
NUM_RUNS: Final = 5


def quickstart() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "quickstart.yml").read_text())
    return {**document, "hostname": "127.0.0.1", "port": 0}


async def seconds_to_healthy(folder: pathlib.Path) -> float:
    async with deployed(folder, quickstart()) as deployment:
        return deployment.healthy_after_s


async def orchestrator_alone(folder: pathlib.Path) -> tuple[float, float]:
    """Seconds until it answers HTTP, and its resident MiB, with servers that never come."""
    document = quickstart()
    for section, port in (("context_servers", 1), ("generation_servers", 2)):
        document[section] = {"num_instances": 1, "urls": [f"127.0.0.1:{port}"]}
    async with started(folder, document) as deployment:
        await asyncio.sleep(1.0)
        return deployment.listening_after_s, resident_mib(deployment)


async def seconds_to_ready(*flags: str) -> float:
    """Of one generation server with the bundled model, on a core of its own."""
    core = max(os.sched_getaffinity(0))
    start = time.perf_counter()
    async with running("-m", "generation_server", MODEL, "--port=0", f"--cpu_affinity={core}", *flags):
        return time.perf_counter() - start


def resident_mib(deployment: Deployment) -> float:
    return float(psutil.Process(deployment.process.pid).memory_info().rss / 2**20)


async def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        healthy = [await seconds_to_healthy(folder) for _ in range(NUM_RUNS)]
        alone = [await orchestrator_alone(folder) for _ in range(NUM_RUNS)]
    ready = {dtype: [await seconds_to_ready(f"--dtype={dtype}") for _ in range(NUM_RUNS)] for dtype in DTYPES}
    listening, resident = [seconds for seconds, _ in alone], [mib for _, mib in alone]
    report.write(
        "start",
        "Start from warm files",
        [
            report.Row(what="orchestrator + 1 context + 1 generation server: first 200 of /health",
                       seen=report.spread(healthy, "s"), bar="at most 8 s", holds=statistics.median(healthy) <= 8),
            report.Row(what="orchestrator alone: answers HTTP", seen=report.spread(listening, "s"),
                       bar="under 2 s", holds=statistics.median(listening) < 2),
            report.Row(what="orchestrator alone: resident memory", seen=report.spread(resident, "MiB"),
                       bar="under 120 MB", holds=max(resident) < 120e6 / 2**20),
            *(report.Row(what=f"one server, {dtype}: process start to its ready line", seen=report.spread(seconds, "s"),
                         bar="at most 3 s", holds=statistics.median(seconds) <= 3) for dtype, seconds in ready.items()),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    asyncio.run(main())
