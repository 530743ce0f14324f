"""One context and one generation process on one GPU say what one process says."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

import pytest
import torch

from disaggregated.sampling_params import SamplingParams
from kvtransfer.transports import cuda_runtime
from tests.support.server_client import complete_disaggregated
from tests.support.servers import random_prompt, server_pair, write_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

FLAGS = (
    "--device=cuda",
    "--max-seq-len=1024",
    "--max-batch-size=8",
    "--kv-cache-config.enable-block-reuse=false",  # What was computed locally must travel all the same.
)
SAMPLINGS = (
    SamplingParams(max_tokens=24),
    SamplingParams(max_tokens=24, temperature=0.9, top_p=0.9, seed=11),
)


HAS_IPC = cuda_runtime.missing() is None
STAGED = "cuda:0 -> host -> cuda:0"


@pytest.mark.parametrize(
    ("backend", "cuda_ipc", "devices"),
    [("DEFAULT", "true", "cuda:0 -> cuda:0" if HAS_IPC else STAGED), ("SHM", "false", STAGED), ("TCP", "true", STAGED)],
)
def test_disaggregated_tokens_are_those_of_one_process(
    tmp_path: Path, backend: str, cuda_ipc: str, devices: str
) -> None:
    async def compare() -> None:
        model = write_model(tmp_path)
        transceiver = "--cache-transceiver-config"
        flags = (*FLAGS, f"{transceiver}.backend={backend}", f"{transceiver}.cuda-ipc={cuda_ipc}")
        async with server_pair(model, *flags) as pair:
            for length in (5, 70, 300):
                for sampling in SAMPLINGS:
                    prompt = random_prompt(length)
                    whole = await pair.generation.complete(prompt, sampling)
                    apart = await complete_disaggregated(pair.context, pair.generation, prompt, sampling)
                    assert apart.token_ids == whole.token_ids, f"a prompt of {length}"
            beat = await pair.generation.wait_idle()
            await pair.wait_idle()
            assert [link.devices for link in beat.links] == [devices], [link.why for link in beat.links]

    asyncio.run(compare())
