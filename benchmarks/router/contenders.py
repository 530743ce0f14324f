"""Who takes part: each router as a process of its own on one core, in front of mock servers on the other."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

import psutil
import yaml

from benchmarks.peers import Routers
from benchmarks.router.client import Connection, request
from benchmarks.wire.children import Child, child
from disaggregated.model_files import resolve

READY_TIMEOUT_S: Final = 60.0
OURS: Final = "ours"
SGLANG: Final = "sglang-router"
VLLM: Final = "vllm-router"
NGINX: Final = "nginx"
MODEL: Final = "smollm2-135m-instruct"
SEQUENCE_TOKENS_MAX: Final = 1 << 20
PROMPT: Final = "Name three rivers of the north and say in one sentence where each of them meets the sea."


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    name: str
    port: int
    pid: int
    model: str
    mocks: Child

    def chat(self, num_tokens: int, *, stream: bool) -> bytes:
        """A short question. `ignore_eos` because mock tokens mean nothing; no router does anything about it."""
        messages = [{"role": "user", "content": PROMPT}]
        body = {"model": self.model, "messages": messages, "max_tokens": num_tokens, "stream": stream}
        return request("/v1/chat/completions", body)

    def of_token_ids(self, num_tokens: int, token_ids: Sequence[int]) -> bytes:
        body = {"model": self.model, "prompt": list(token_ids), "max_tokens": num_tokens, "stream": False}
        return request("/v1/completions", body)

    def cpu_s(self) -> float:
        """That it has used so far, user and system, of all its threads and children."""
        whole = psutil.Process(self.pid)
        times = [one.cpu_times() for one in (whole, *whole.children(recursive=True))]
        return sum(each.user + each.system for each in times)

    def resident_bytes(self) -> int:
        whole = psutil.Process(self.pid)
        return sum(one.memory_info().rss for one in (whole, *whole.children(recursive=True)))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    router: frozenset[int]
    load: frozenset[int]

    @classmethod
    def of_this_machine(cls) -> Cores:
        """The last core for whoever is measured; the others for mocks and clients."""
        all_cores = sorted(os.sched_getaffinity(0))
        return cls(router=frozenset(all_cores[-1:]), load=frozenset(all_cores[:-1] or all_cores))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What all of a run's processes share; they end with `stack`."""

    stack: contextlib.AsyncExitStack
    folder: pathlib.Path
    cores: Cores


@contextlib.asynccontextmanager
async def contenders(names: Sequence[str], cores: Cores) -> AsyncIterator[list[Contender]]:
    """All of them run at once, and are idle but for the one whose turn it is."""
    before = os.sched_getaffinity(0)
    async with contextlib.AsyncExitStack() as stack:
        os.sched_setaffinity(0, cores.load)
        stack.callback(os.sched_setaffinity, 0, before)
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="router-")))
        ground = Ground(stack=stack, folder=folder, cores=cores)
        found: list[Contender] = []
        if OURS in names:
            found.append(await _ours(ground))
        others = [name for name in names if name != OURS]
        if others:
            mocks = await stack.enter_async_context(child("-m", "benchmarks.router.mock_http"))
            ports = await mocks.answer()
            found += [await _other(ground, name, mocks, ports) for name in others]
        yield found


async def _ours(ground: Ground) -> Contender:
    folder = ground.folder
    model = folder / MODEL
    _copy_tokenizer(model)
    mocks = await ground.stack.enter_async_context(child("-m", "benchmarks.router.mock_servers", model))
    addresses = await mocks.answer()
    [port] = _free_ports(1)
    config = folder / "disagg-config.yml"
    pools = {
        "context_servers": {"num_instances": 2, "urls": addresses[:2], "router": {"type": "round_robin"}},
        "generation_servers": {"num_instances": 2, "urls": addresses[2:], "router": {"type": "round_robin"}},
    }
    keys = {"hostname": "localhost", "port": port, "model": str(model), "log_level": "warning", **pools}
    config.write_text(yaml.safe_dump(keys))
    command = [sys.executable, "-m", "orchestrator", "-c", str(config)]
    pid = await _started(ground, OURS, command, port)
    return Contender(name=OURS, port=port, pid=pid, model=str(model), mocks=mocks)


def _copy_tokenizer(target: pathlib.Path) -> None:
    """The bundled model's, of a model that would take very long sequences: its own end after 8,192 tokens."""
    shutil.copytree(
        resolve(MODEL, weights=False).path, target, ignore=shutil.ignore_patterns("*.safetensors", "*.gguf")
    )
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "max_position_embeddings": SEQUENCE_TOKENS_MAX}))


async def _other(ground: Ground, name: str, mocks: Child, ports: Sequence[int]) -> Contender:
    routers = Routers.found()
    if routers is None:
        raise SystemExit(f"{name} is not there: python -m benchmarks.peers --only routers")
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    port, metrics_port, *bootstrap_ports = _free_ports(4)
    address = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics_port)]
    options = [*address, "--policy", "round_robin", "--log-level", "warn" if name == SGLANG else "warning"]
    decodes = [word for url in urls[2:] for word in ("--decode", url)]
    if name == SGLANG:
        prefills = [
            word
            for url, bootstrap_port in zip(urls[:2], bootstrap_ports, strict=True)
            for word in ("--prefill", url, str(bootstrap_port))
        ]
        command = [routers.python, "-m", "sglang_router.launch_router", "--pd-disaggregation", *prefills, *decodes]
        command += [*options, "--worker-startup-check-interval", "1"]
    elif name == VLLM:
        prefills = [word for url in urls[:2] for word in ("--prefill", url)]
        command = [routers.python, "-m", "vllm_router.launch_router", "--vllm-pd-disaggregation", *prefills, *decodes]
        command += [*options, "--kv-connector", "nixl"]
    else:
        folder = ground.folder
        (folder / "nginx.conf").write_text(_nginx_config(folder, port, ports[2:]))
        command = [routers.nginx, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "nginx.log")]
    pid = await _started(ground, name, [str(word) for word in command], port)
    return Contender(name=name, port=port, pid=pid, model="mock", mocks=mocks)


def _nginx_config(folder: pathlib.Path, port: int, decode_ports: Sequence[int]) -> str:
    servers = "".join(f"server 127.0.0.1:{each};" for each in decode_ports)
    paths = "".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return f"""
daemon off; master_process off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{ worker_connections 8192; }}
http {{
    {paths}
    access_log off; tcp_nodelay on; keepalive_requests 1000000;
    upstream decode {{ {servers} keepalive 2048; keepalive_requests 1000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://decode; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
        }}
    }}
}}
"""


async def _started(ground: Ground, name: str, command: Sequence[str], port: int) -> int:
    """The pid of a router that answers a chat; killed when the stack is left."""
    log = ground.folder / f"{name}.log"
    output = ground.stack.enter_context(log.open("wb"))
    environ: Mapping[str, str] = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_PROXY": "*"}
    command = ["taskset", "-c", ",".join(map(str, ground.cores.router)), *command]
    started = await asyncio.create_subprocess_exec(*command, stdout=output, stderr=output, env=environ)
    ground.stack.push_async_callback(_killed, started)
    give_up_s = time.monotonic() + READY_TIMEOUT_S
    while not await _answers(port):
        if started.returncode is not None or time.monotonic() > give_up_s:
            raise SystemExit(f"{name} did not start:\n{log.read_text()[-2000:]}")
        await asyncio.sleep(0.2)
    return started.pid


async def _answers(port: int) -> bool:
    """Any answer of /health that says yes."""
    try:
        connection = await Connection.open(port)
    except OSError:
        return False
    reply = await connection.ask(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
    connection.transport.close()
    return reply.status == 200


async def _killed(started: asyncio.subprocess.Process) -> None:
    if started.returncode is None:
        for one in psutil.Process(started.pid).children(recursive=True):
            one.kill()
        started.kill()
    await started.wait()


def _free_ports(count: int) -> list[int]:
    """That were free a moment ago; held together, so that they differ."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[Any] = [held.getsockname()[1] for held in sockets]
    for held in sockets:
        held.close()
    return ports
