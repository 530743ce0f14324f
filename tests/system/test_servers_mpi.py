"""Servers of one `mpirun`: blocks by MPI, tokens as from one process; a server that dies takes no other with it, and
one that is started again outside of their world is used all the same."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import re
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Final

import psutil
import pytest

from disaggregated.errors import DisaggregatedError
from disaggregated.sampling_params import SamplingParams
from kvtransfer import registry
from kvtransfer.transports import mpirun as mpirun_of
from tests.support.kv_pools import eventually
from tests.support.processes import ServerProcess, running, spawned
from tests.support.server_client import ContextClient, GenerationClient, complete_disaggregated
from tests.support.servers import arguments, generation_server, random_prompt, write_model

BECOME: Final = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
SAMPLED: Final = SamplingParams(max_tokens=16, temperature=1.0, seed=7)
READY: Final = r"^READY {role} (\S+:\d+) instance={role}-(?!{but}-)(\d+)-"
BY_MPI: Final = "--cache-transceiver-config.backend=MPI"
OR_ELSE: Final = "--cache-transceiver-config.fallback=true"

pytestmark = pytest.mark.skipif(
    mpirun_of.path() is None or "mpi4py" in str(registry.missing("MPI")),
    reason=f"needs mpi4py and mpirun: {mpirun_of.TO_INSTALL}",
)


def is_alive(server: psutil.Process) -> bool:
    """One that mpirun has not waited for lies around dead until somebody else does."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return server.is_running() and server.status() != psutil.STATUS_ZOMBIE
    return False


@contextlib.asynccontextmanager
async def launched(*roles: str, model: pathlib.Path, flags: Sequence[str] = (BY_MPI,)) -> AsyncIterator[ServerProcess]:
    """One mpirun of one server of each role, in that order. Nothing of it is left afterwards."""
    command = mpirun_of.command(*([sys.executable, *arguments(role, model, *flags)] for role in roles))
    async with spawned("-c", BECOME, *command, environ=mpirun_of.LOOPBACK_ONLY) as mpirun:
        try:
            yield mpirun
        finally:
            if mpirun.process.returncode is None:
                servers = psutil.Process(mpirun.pid).children(recursive=True)
                mpirun.signal(signal.SIGTERM)
                await mpirun.wait_exit()
                await eventually(lambda: not any(map(is_alive, servers)))


async def ready(mpirun: ServerProcess, role: str, *, but: int = 0) -> tuple[str, int]:
    """Its address and its process id, which is not `but`."""
    pattern = READY.format(role=role, but=but)
    async with asyncio.timeout(200):
        line = await mpirun.wait_line(pattern)
    match = re.search(pattern, line)
    assert match is not None
    return match[1], int(match[2])


async def test_blocks_travel_by_mpi_and_the_tokens_are_those_of_one_process(tmp_path: pathlib.Path) -> None:
    model = write_model(tmp_path)
    prompts = [random_prompt(num_tokens) for num_tokens in (1, 17, 300, 1000)]
    async with generation_server(model, "--kv-cache-config.enable-block-reuse=false") as (_, oracle):
        expected = [(await oracle.complete(prompt, SAMPLED)).token_ids for prompt in prompts]
    async with launched("context", "generation", model=model) as mpirun:
        context_address, context_pid = await ready(mpirun, "context")
        address, pid = await ready(mpirun, "generation")
        async with ContextClient(context_address) as context, GenerationClient(address) as generation:
            for prompt, token_ids in zip(prompts, expected, strict=True):
                assert (await complete_disaggregated(context, generation, prompt, SAMPLED)).token_ids == token_ids
            await mpirun.wait_line(r"kv_source_connected .*transport=MPI")
        for server in (context_pid, pid):
            os.kill(server, signal.SIGTERM)
        assert await mpirun.wait_exit() == 0


async def test_a_killed_server_takes_no_other_with_it_and_the_others_go_on_by_mpi(tmp_path: pathlib.Path) -> None:
    prompt = random_prompt(200)
    async with launched("context", "context", "generation", model=write_model(tmp_path)) as mpirun:
        dying_address, dying_pid = await ready(mpirun, "context")
        other_address, other_pid = await ready(mpirun, "context", but=dying_pid)
        address, _ = await ready(mpirun, "generation")
        async with (
            ContextClient(dying_address) as dying,
            ContextClient(other_address) as other,
            GenerationClient(address) as generation,
        ):
            before = await complete_disaggregated(dying, generation, prompt, SAMPLED)
            os.kill(dying_pid, signal.SIGKILL)
            with pytest.raises(DisaggregatedError):
                await complete_disaggregated(dying, generation, random_prompt(200, seed=1), SAMPLED)
            after = await complete_disaggregated(other, generation, prompt, SAMPLED)
            assert after.token_ids == before.token_ids
            await mpirun.wait_line(rf"kv_source_connected source=context-{other_pid}-\S+ transport=MPI")
            await generation.wait_idle()


async def test_a_server_that_comes_back_outside_of_its_world_is_read_another_way(tmp_path: pathlib.Path) -> None:
    """MPI has no way back in. With `fallback: true` the next best that both ends have carries the blocks."""
    model = write_model(tmp_path)
    prompt = random_prompt(200)
    async with launched("context", "generation", model=model, flags=(BY_MPI, OR_ELSE)) as mpirun:
        context_address, context_pid = await ready(mpirun, "context")
        address, _ = await ready(mpirun, "generation")
        async with GenerationClient(address) as generation:
            async with ContextClient(context_address) as context:
                before = await complete_disaggregated(context, generation, prompt, SAMPLED)
                await mpirun.wait_line(r"kv_source_connected .*transport=MPI")
                os.kill(context_pid, signal.SIGKILL)
            async with (
                running(*arguments("context", model, BY_MPI, OR_ELSE)) as again,
                ContextClient(again.address) as context,
            ):
                after = await complete_disaggregated(context, generation, prompt, SAMPLED)
                assert after.token_ids == before.token_ids
                await mpirun.wait_line(r"kv_source_connected .*transport=SHM .*MPI is not offered")


async def test_a_server_that_was_not_launched_by_mpirun_says_how_to(tmp_path: pathlib.Path) -> None:
    async with spawned(*arguments("context", write_model(tmp_path), BY_MPI)) as server:
        assert await server.wait_exit() != 0
        assert "MPI needs both servers in one MPI world: mpirun " in server.words()
