"""Servers of one `mpirun`: blocks by MPI, tokens as from one process, and a server that dies takes no other with it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from typing import Final

import pytest

from disaggregated.errors import DisaggregatedError
from disaggregated.sampling_params import SamplingParams
from kvtransfer.transports.mpi_world import MPIRUN_FLAGS
from tests.support.processes import ServerProcess, spawned
from tests.support.server_client import ContextClient, GenerationClient, complete_disaggregated
from tests.support.servers import arguments, generation_server, random_prompt, write_model

BESIDE_PYTHON: Final = str(pathlib.Path(sys.executable).parent)
MPIRUN: Final = shutil.which("mpirun", path=os.pathsep.join([BESIDE_PYTHON, os.environ["PATH"]]))
BECOME: Final = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
SAMPLED: Final = SamplingParams(max_tokens=16, temperature=1.0, seed=7)
READY: Final = r"^READY {role} (\S+:\d+) instance={role}-(\d+)-"

pytestmark = pytest.mark.skipif(MPIRUN is None, reason="needs mpirun: pip install 'disaggregated[mpi]'")


@contextlib.asynccontextmanager
async def launched(*roles: str, model: pathlib.Path) -> AsyncIterator[ServerProcess]:
    """One mpirun of one server of each role, in that order. Killed at the end if it is still there."""
    assert MPIRUN is not None
    environ = {"TRTLLM_USE_MPI_KVCACHE": "1", "OMPI_MCA_btl": "self,sm,tcp", "OMPI_MCA_btl_tcp_if_include": "lo"}
    command = [MPIRUN, "--allow-run-as-root", "--oversubscribe", *MPIRUN_FLAGS]
    for role in roles:
        command += ["-n", "1", sys.executable, *arguments(role, model), ":"]
    async with spawned("-c", BECOME, *command[:-1], environ=environ) as mpirun:
        yield mpirun


async def ready(mpirun: ServerProcess, role: str) -> tuple[str, int]:
    """Its address and its process id."""
    async with asyncio.timeout(60):
        line = await mpirun.wait_line(READY.format(role=role))
    match = re.search(READY.format(role=role), line)
    assert match is not None
    return match[1], int(match[2])


async def test_blocks_travel_by_mpi_and_the_tokens_are_those_of_one_process(tmp_path: pathlib.Path) -> None:
    model = write_model(tmp_path)
    prompts = [random_prompt(num_tokens) for num_tokens in (1, 17, 300, 1000)]
    async with generation_server(model, "--kv-cache-config.enable-block-reuse=false") as (_, oracle):
        expected = [(await oracle.complete(prompt, SAMPLED)).token_ids for prompt in prompts]
    async with launched("context", "generation", model=model) as mpirun:
        (context_address, context_pid), (address, pid) = (
            await ready(mpirun, "context"),
            await ready(mpirun, "generation"),
        )
        async with ContextClient(context_address) as context, GenerationClient(address) as generation:
            for prompt, token_ids in zip(prompts, expected, strict=True):
                assert (await complete_disaggregated(context, generation, prompt, SAMPLED)).token_ids == token_ids
            await mpirun.wait_line(r"kv_source_connected .*transport=MPI")
        for server in (context_pid, pid):
            os.kill(server, signal.SIGTERM)
        assert await mpirun.wait_exit() == 0


async def test_a_killed_server_takes_no_other_with_it(tmp_path: pathlib.Path) -> None:
    prompt = random_prompt(200)
    async with launched("context", "generation", model=write_model(tmp_path)) as mpirun:
        (context_address, context_pid), (address, pid) = (
            await ready(mpirun, "context"),
            await ready(mpirun, "generation"),
        )
        async with ContextClient(context_address) as context, GenerationClient(address) as generation:
            before = await complete_disaggregated(context, generation, prompt, SAMPLED)
            os.kill(context_pid, signal.SIGKILL)
            with pytest.raises(DisaggregatedError):
                await complete_disaggregated(context, generation, random_prompt(200, seed=1), SAMPLED)
            assert (await generation.complete(prompt, SAMPLED)).token_ids == before.token_ids
            await generation.wait_idle()
        os.kill(pid, signal.SIGTERM)
        await mpirun.wait_exit()
