"""A whole deployment as an operator runs it: scaled, hurt, started wrongly, and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import aiohttp
import psutil
import pytest

from tests.support.completions import Completion, CompletionFailed, complete
from tests.support.deployment import Deployment, deployed, started

ROOT: Final = Path(__file__).parents[2]
QUICK: Final = {"model": "smollm2-135m-instruct", "max_seq_len": 512, "kv_cache_config": {"max_tokens": 4096}}


async def processes(deployment: Deployment) -> dict[str, dict[str, Any]]:
    info = await deployment.get_json("/cluster_info")
    return {row["name"]: row for row in info["processes"]}


@contextlib.asynccontextmanager
async def traffic(deployment: Deployment, num_clients: int) -> AsyncIterator[list[Completion]]:
    """Clients that ask again and again, until the block ends; each request must be answered in full."""
    answers: list[Completion] = []
    is_over = asyncio.Event()

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        while not is_over.is_set():
            answers.append(await complete(session, deployment.url, [1, 2, 3, 4 + number], max_tokens=8))

    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        for number in range(num_clients):
            group.create_task(client(session, number))
        yield answers
        is_over.set()


async def scale(deployment: Deployment, **counts: int) -> None:
    url = f"{deployment.url}/cluster/scale"
    async with aiohttp.ClientSession() as session, session.post(url, json=counts) as answer:
        assert answer.status == 200, await answer.text()


async def under_way(deployment: Deployment) -> None:
    """Until a request is being served; /ledger has no way to wait."""
    for _ in range(1000):
        if (await deployment.get_json("/ledger"))["running"]:
            return
    raise AssertionError("nothing runs")


async def test_a_running_deployment_is_scaled_and_hurt_without_one_failed_request(tmp_path: Path) -> None:
    async with deployed(tmp_path, QUICK) as deployment:
        async with traffic(deployment, 3) as answers:
            await scale(deployment, generation=2)
            assert len(await processes(deployment)) == 3
            await scale(deployment, context=0)
            await scale(deployment, generation=1, context=1)
            assert set(await processes(deployment)) == {"context-0", "generation-0"}
            num_before = len(answers)
        assert len(answers) >= num_before >= 3
        by_prompt = {tuple(answer.token_ids) for answer in answers}
        assert len(by_prompt) <= 3, "one prompt was answered in two ways"
        assert all(len(answer.token_ids) == 8 for answer in answers)

        victim = (await processes(deployment))["generation-0"]
        os.kill(victim["pid"], signal.SIGKILL)
        async with aiohttp.ClientSession() as session:
            answer = await complete(session, deployment.url, [1, 2, 3, 4], max_tokens=8)
        assert tuple(answer.token_ids) in by_prompt
        restarted = (await processes(deployment))["generation-0"]
        assert (restarted["restarts"], restarted["last_exit"]) == (1, "signal 9")


async def test_ctrl_c_in_the_middle_of_requests_ends_everything_soon(tmp_path: Path) -> None:
    async with deployed(tmp_path, QUICK) as deployment:
        pids = [row["pid"] for row in (await processes(deployment)).values()]
        async with aiohttp.ClientSession() as session:
            asking = asyncio.create_task(complete(session, deployment.url, [1, 2, 3], max_tokens=500))
            await under_way(deployment)
            assert await deployment.stop() < 12.0
            with pytest.raises(CompletionFailed, match="the orchestrator is stopping"):
                await asking
        assert deployment.process.returncode == 0
        assert not [pid for pid in pids if psutil.pid_exists(pid)]


async def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    async with started(tmp_path, QUICK) as deployment:
        deployment.process.send_signal(signal.SIGINT)
        deployment.process.send_signal(signal.SIGINT)
        code = await asyncio.wait_for(deployment.process.wait(), 15)
        assert code in (0, 130)


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("model: /no/such/model\nport: 0\n", 4, "disaggregated: "),
        ("modell: m\n", 2, "disaggregated: disagg-config.yml: modell: unknown key; did you mean model?"),
        ("model: m\ntensor_parallel_size: 2\n", 2, "disaggregated: tensor_parallel_size: 2 is not built yet"),
        (
            "hostname: no.such.host.invalid\nmodel: m\n",
            2,
            "disaggregated: hostname: no.such.host.invalid is no address",
        ),
    ],
)
def test_a_deployment_that_cannot_start_says_why_in_its_last_line(
    tmp_path: Path, text: str, code: int, message: str
) -> None:
    path = tmp_path / "disagg-config.yml"
    path.write_text(text)
    ended = start_in_vain(path)
    assert ended.returncode == code
    assert ended.stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in ended.stderr


def test_a_taken_port_costs_no_model_load(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        path = tmp_path / "disagg-config.yml"
        path.write_text(f"model: smollm2-135m-instruct\nhostname: 127.0.0.1\nport: {port}\n")
        ended = start_in_vain(path)
    assert ended.returncode == 3
    assert ended.stderr.splitlines()[-1].startswith(f"disaggregated: port {port} of 127.0.0.1 is taken by process ")


def start_in_vain(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator", "-c", str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
