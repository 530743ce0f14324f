"""What is measured, and how each is started on two cores: ours, and the peers as their makers mean them to run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from benchmarks.peers import Peers
from benchmarks.systems.client import NixlPair, OneUrl, Target
from benchmarks.systems.serving import Command, free_port, running
from disaggregated.cores import available_cores
from disaggregated.model_files import resolve

MODEL: Final = "smollm2-135m-instruct"
KV_TOKENS: Final = 32_768
"""Room for load c: six chats of some thousand tokens, and long prompts."""
KV_BYTES: Final = 3 << 30
"""More than that many tokens take in float32."""
START_TIMEOUT_S: Final = 120.0
VLLM_START_TIMEOUT_S: Final = 600.0
"""It compiles at its very first start."""
VLLM_ENVIRON: Final = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "UCX_NET_DEVICES": "lo",
    "UCX_RCACHE_MAX_UNRELEASED": "1024",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Serving:
    target: Target
    remarks: list[str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class System:
    name: str
    """On the command line and in the results."""
    title: str
    start: Callable[[Path], contextlib.AbstractAsyncContextManager[Serving]]
    """Serves until the block ends; what it writes goes below the folder."""
    loads: tuple[str, ...] = ("a", "b", "c")
    """Those in which it differs from another entry."""


def two_cores() -> tuple[int, int]:
    """The two that every system gets; both are the same where there is only one."""
    cores = available_cores()
    return cores[0], cores[min(1, len(cores) - 1)]


def systems(peers: Peers) -> list[System]:
    """Those that can be measured here."""
    found = [
        System(name="ours-fp32", title="ours, 1 + 1, fp32", start=split("float32")),
        System(name="ours-int8", title="ours, 1 + 1, int8", start=split("int8")),
        System(
            name="balanced-fp32",
            title="ours, 1 + 1 balanced, fp32",
            start=split("float32", balances=True),
            loads=("b",),
        ),
        System(
            name="balanced-int8", title="ours, 1 + 1 balanced, int8", start=split("int8", balances=True), loads=("b",)
        ),
        System(name="mixed-fp32", title="ours, mixed, fp32", start=mixed("float32")),
        System(name="mixed-int8", title="ours, mixed, int8", start=mixed("int8")),
    ]
    if peers.vllm_python:
        found.append(System(name="vllm", title="vLLM CPU, fp32", start=vllm(peers.vllm_python)))
    if peers.vllm_python and peers.has_nixl:
        found.append(System(name="vllm-nixl", title="vLLM CPU, NIXL 1 + 1, fp32", start=vllm_nixl(peers.vllm_python)))
    if peers.llama_cpp:
        for kind, path in peers.llama_cpp.models.items():
            server = peers.llama_cpp.binaries / "llama-server"
            found.append(System(name=f"llama-{kind}", title=f"llama.cpp, {kind}", start=llama_cpp(server, path)))
    return found


Start = Callable[[Path], contextlib.AbstractAsyncContextManager[Serving]]


def split(dtype: str, *, balances: bool = False) -> Start:
    """One context and one generation server, a core each, and the orchestrator wherever there is room. `balances`: the
    generation server prefills too while that holds up less than the context server's queue does."""

    @contextlib.asynccontextmanager
    async def start(folder: Path) -> AsyncIterator[Serving]:
        port = free_port()
        path = folder / "disagg-config.yml"
        path.write_text(yaml.safe_dump(split_document(dtype, port, balances=balances)))
        url = f"http://127.0.0.1:{port}"
        words = [sys.executable, "-m", "orchestrator", "-c", str(path)]
        command = Command(words=words, health_url=f"{url}/health", cores=two_cores(), is_checked=False)
        async with running([command], folder, start_timeout_s=START_TIMEOUT_S) as remarks:
            yield Serving(OneUrl(url=url, model=MODEL), remarks)

    return start


def split_document(dtype: str, port: int, *, balances: bool = False) -> dict[str, Any]:
    first, second = two_cores()
    pool = {"max_tokens": KV_TOKENS, "cpu_memory_budget_bytes": KV_BYTES}
    section = {"num_instances": 1, "num_threads": 1, "dtype": dtype, "kv_cache_config": pool}
    return {
        "hostname": "127.0.0.1",
        "port": port,
        "model": MODEL,
        "conditional_disagg_config": {"balance_prefill": balances},
        "context_servers": {**section, "cpu_affinity": [first]},
        "generation_servers": {**section, "cpu_affinity": [second]},
    }


def mixed(dtype: str) -> Start:
    """One server on both cores."""

    @contextlib.asynccontextmanager
    async def start(folder: Path) -> AsyncIterator[Serving]:
        port, cores = free_port(), two_cores()
        url = f"http://127.0.0.1:{port}"
        flags = ["--host=127.0.0.1", f"--port={port}", f"--dtype={dtype}", f"--num_threads={len(set(cores))}"]
        flags += [f"--kv_cache_config.max_tokens={KV_TOKENS}", f"--kv_cache_config.cpu_memory_budget_bytes={KV_BYTES}"]
        words = [sys.executable, "-m", "orchestrator", "serve", "mixed", MODEL, *flags]
        command = Command(words=words, health_url=f"{url}/health", cores=cores, is_checked=False)
        async with running([command], folder, start_timeout_s=START_TIMEOUT_S) as remarks:
            yield Serving(OneUrl(url=url, model=MODEL), remarks)

    return start


def vllm(python: Path) -> Start:
    @contextlib.asynccontextmanager
    async def start(folder: Path) -> AsyncIterator[Serving]:
        port, cores = free_port(), two_cores()
        command = vllm_command(python, port, tuple(dict.fromkeys(cores)), {})
        async with running([command], folder, start_timeout_s=VLLM_START_TIMEOUT_S) as remarks:
            yield Serving(OneUrl(url=f"http://127.0.0.1:{port}", model=MODEL), remarks)

    return start


def vllm_nixl(python: Path) -> Start:
    """Two servers with a core each, KV in host memory, handed over by NIXL."""
    transfer = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}

    @contextlib.asynccontextmanager
    async def start(folder: Path) -> AsyncIterator[Serving]:
        commands, urls = [], []
        for core in two_cores():
            port = free_port()
            environ = {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
            words = ["--kv-transfer-config", json.dumps(transfer)]
            commands.append(vllm_command(python, port, (core,), environ, *words))
            urls.append(f"http://127.0.0.1:{port}")
        async with running(commands, folder, start_timeout_s=VLLM_START_TIMEOUT_S) as remarks:
            yield Serving(NixlPair(prefill_url=urls[0], decode_url=urls[1], model=MODEL), remarks)

    return start


def vllm_command(
    python: Path, port: int, cores: tuple[int, ...], environ: Mapping[str, str], *more_words: str
) -> Command:
    words = [str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(resolve(MODEL).path)]
    words += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL]
    words += ["--dtype", "float32", "--max-model-len", "8192", "--no-enable-log-requests", *more_words]
    return Command(
        words=words,
        health_url=f"http://127.0.0.1:{port}/health",
        cores=cores,
        environ={**VLLM_ENVIRON, "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)), **environ},
    )


def llama_cpp(server: Path, model: Path) -> Start:
    @contextlib.asynccontextmanager
    async def start(folder: Path) -> AsyncIterator[Serving]:
        port, cores = free_port(), two_cores()
        num_threads = str(len(set(cores)))
        words = [str(server), "--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
        words += ["--threads", num_threads, "--threads-batch", num_threads, "--parallel", "8", "--kv-unified"]
        words += ["--ctx-size", str(KV_TOKENS), "--no-webui", "--log-verbosity", "0"]
        command = Command(words=words, health_url=f"http://127.0.0.1:{port}/health", cores=cores)
        async with running([command], folder, start_timeout_s=START_TIMEOUT_S) as remarks:
            extra = {"cache_prompt": False}
            yield Serving(OneUrl(url=f"http://127.0.0.1:{port}", model=MODEL, extra=extra), remarks)

    return start
