"""A server dies, freezes or crashes: the other one says so, keeps its blocks, and goes on."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import signal
from collections.abc import AsyncIterator

import pytest

from disaggregated.errors import ServerLost, StaleEpoch, TransferError
from disaggregated.sampling_params import SamplingParams
from disaggregated.v1 import control_pb2
from tests.support.processes import running, spawned
from tests.support.server_client import ContextClient, complete_disaggregated
from tests.support.servers import arguments, random_prompt, server_pair, write_model

FEW = SamplingParams(max_tokens=4)
PROMPT = random_prompt(2000)


@pytest.mark.parametrize("backend", ["SHM", "TCP"])
async def test_a_context_server_killed_in_a_prefill_costs_one_retryable_error(
    tmp_path: pathlib.Path, backend: str
) -> None:
    model = write_model(tmp_path, slow=True)
    async with server_pair(model, f"--cache-transceiver-config.backend={backend}") as pair:
        stale = pair.context.ticket("of-the-dead")
        async with contextlib.aclosing(pair.context.prefill(PROMPT, FEW, transfer_id="cut")) as progress:
            key = await pair.generation.admit(PROMPT, FEW, source=pair.context.ticket("cut"))
            await anext(progress)
            pair.context_process.signal(signal.SIGKILL)
            with pytest.raises(ServerLost):
                _ = [message async for message in progress]
        with pytest.raises(TransferError) as caught:
            await pair.generation.completion(key)
        assert caught.value.retryable
        await pair.generation.wait_idle()
        expected = await pair.generation.complete(PROMPT, FEW)

        again = arguments("context", model, f"--port={pair.context_process.port}")
        async with running(*again) as restarted, ContextClient(restarted.address) as context:
            assert restarted.address == pair.context_process.address
            completion = await complete_disaggregated(context, pair.generation, PROMPT[:200], FEW)
            assert completion.token_ids == (await pair.generation.complete(PROMPT[:200], FEW)).token_ids
            key = await pair.generation.admit(PROMPT[:300], FEW, source=stale)
            with pytest.raises(StaleEpoch):
                await pair.generation.completion(key)
        assert len(expected.token_ids) == 4
        await pair.generation.wait_idle()


async def test_a_generation_server_killed_while_it_pulls_leaves_no_lease_behind(tmp_path: pathlib.Path) -> None:
    async with server_pair(write_model(tmp_path, slow=True)) as pair:
        async with contextlib.aclosing(pair.context.prefill(PROMPT, FEW, transfer_id="orphaned")) as progress:
            await pair.generation.admit(PROMPT, FEW, source=pair.context.ticket("orphaned"))
            await anext(progress)
            pair.generation_process.signal(signal.SIGKILL)
            with contextlib.suppress(TransferError):
                _ = [message async for message in progress]
        await pair.context.wait_idle(timeout_s=20)
        assert (await pair.context.first_token(PROMPT[:50], FEW)).finish_reason == ""


async def test_heartbeats_stop_while_a_server_is_frozen_and_go_on_after(tmp_path: pathlib.Path) -> None:
    async with running(*arguments("context", write_model(tmp_path))) as server, ContextClient(server.address) as client:
        async with contextlib.aclosing(client.heartbeats(interval_s=0.02)) as heartbeats:
            await anext(heartbeats)
            server.signal(signal.SIGSTOP)
            with pytest.raises(TimeoutError):
                await next_silence(heartbeats)
        server.signal(signal.SIGCONT)
        await client.wait_idle()


async def next_silence(heartbeats: AsyncIterator[control_pb2.Heartbeat]) -> None:
    """Reads on, over what was sent before the freeze; raises TimeoutError once nothing comes for 25 intervals."""
    while True:
        await asyncio.wait_for(anext(heartbeats), timeout=0.5)


CRASHING = """
import sys
from disaggregated.engine.runner import TorchModelRunner

execute = TorchModelRunner.execute

def crash(self, batch):
    if any(row.token_ids[0] == 13 for row in batch):
        raise RuntimeError("the device is on fire")
    return execute(self, batch)

TorchModelRunner.execute = crash
sys.argv[0] = "context_server"
from context_server.__main__ import main
from disaggregated.config.server_cli import server_command
server_command("context", main)()
"""


async def test_a_crash_of_the_engine_ends_the_process_with_the_traceback(tmp_path: pathlib.Path) -> None:
    command = arguments("context", write_model(tmp_path))[2:]
    async with spawned("-c", CRASHING, *command) as server:
        await server.wait_ready(60)
        async with ContextClient(server.address) as client:
            await client.first_token([1, 2, 3], FEW)
            with pytest.raises(ServerLost):
                await client.first_token([13, 2, 3], FEW)
        assert await server.wait_exit() == 70
    assert "engine_crashed" in server.words()
    assert "Traceback" in server.words()
    assert "the device is on fire" in server.words()
