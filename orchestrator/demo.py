"""`disaggregated demo`: a whole deployment for the length of one chat, and the chat's story told afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import aiohttp
import click
from rich.console import Console

from disaggregated.config.load import load_deployment
from orchestrator.waterfall import waterfall

START_TIMEOUT_S: Final = 600.0
"""The first start may fetch and convert the bundled model."""
CHAT_TIMEOUT_S: Final = 180.0
STOP_TIMEOUT_S: Final = 10.0

_LISTENING: Final = re.compile(r"^READY orchestrator (\S+)")
_SERVER_JOINED: Final = re.compile(r" server_joined role=\S+ instance=(\S+)")
_BUILT_IN: Final = "{model: smollm2-135m-instruct, dtype: int8}\n"


def demo(config_file: Path | None, *, prompt: str, max_tokens: int) -> None:
    with contextlib.ExitStack() as stack:
        path = config_file
        if path is None:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "demo.yml"
            path.write_text(_BUILT_IN)
        try:
            asyncio.run(_demo(path, prompt=prompt, max_tokens=max_tokens))
        except TimeoutError as error:
            raise click.ClickException("it took too long; see what it says: disaggregated -c FILE") from error
    keep = config_file or f"FILE, with one line in it: {_BUILT_IN.strip()}"
    click.echo(f"To keep one running: disaggregated -c {keep}")


async def _demo(config_file: Path, *, prompt: str, max_tokens: int) -> None:
    console = Console(highlight=False)
    config = load_deployment(config_file, os.environ)
    num_servers = sum(pool.num_instances for pool in (config.context, config.generation) if not pool.urls)
    begin_s = time.monotonic()
    async with _deployment(config_file) as lines:
        with console.status("starting") as status:
            async with asyncio.timeout(START_TIMEOUT_S):
                url = await _wait_ready(lines, num_servers, show=lambda line: status.update(line[: console.width - 4]))
        started_s = time.monotonic() - begin_s
        console.print(f"[green]ready[/] after {started_s:.1f} s: an orchestrator and {num_servers} servers at {url}\n")
        console.print(f"[bold]you[/]   {prompt}")
        async with asyncio.timeout(CHAT_TIMEOUT_S), aiohttp.ClientSession(url) as session:
            request_id = await _chat(session, prompt, max_tokens, console)
            async with session.get(f"/requests/{request_id}") as answer:
                story = await answer.json()
        console.print(f"\n\n[bold]how it was served[/]  GET {url}/requests/{request_id}\n")
        console.print(waterfall(story))
        begin_s = time.monotonic()
    console.print(f"\nstopped, with every server, in {time.monotonic() - begin_s:.1f} s")


@contextlib.asynccontextmanager
async def _deployment(config_file: Path) -> AsyncIterator[AsyncIterator[str]]:
    """The lines of an orchestrator of our own, on a free port, until it is stopped as by Ctrl-C."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "orchestrator", "-c", str(config_file), "--log-level", "info"),
        env={
            **os.environ,
            "DISAGG__PORT": "0",
            "DISAGG_LOG_FORMAT": "text",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    last_lines: deque[str] = deque(maxlen=15)
    assert child.stdout is not None
    lines: asyncio.Queue[str | None] = asyncio.Queue()  # As many as a start and one chat log: hundreds.
    reading = asyncio.create_task(_read(child.stdout, lines, last_lines))
    try:
        yield _each(lines)
    finally:
        if child.returncode is None:
            child.send_signal(signal.SIGINT)
        try:
            await asyncio.wait_for(child.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            child.kill()
            await child.wait()
        await reading
    if child.returncode:
        raise click.ClickException(
            f"the orchestrator ended with exit code {child.returncode}: {' / '.join(last_lines)}"
        )


async def _read(stream: asyncio.StreamReader, lines: asyncio.Queue[str | None], last_lines: deque[str]) -> None:
    async for raw in stream:
        line = raw.decode(errors="replace").rstrip()
        last_lines.append(line)
        lines.put_nowait(line)
    lines.put_nowait(None)


async def _each(lines: asyncio.Queue[str | None]) -> AsyncIterator[str]:
    while (line := await lines.get()) is not None:
        yield line


async def _wait_ready(lines: AsyncIterator[str], num_servers: int, *, show: Callable[[str], object]) -> str:
    url, servers, last = "", set[str](), ""
    async for line in lines:
        show(line)
        last = line or last
        if match := _LISTENING.match(line):
            url = f"http://{match[1]}"
        if match := _SERVER_JOINED.search(line):
            servers.add(match[1])
        if url and len(servers) == num_servers:
            return url
    raise click.ClickException(last.removeprefix("disaggregated: ") or "the orchestrator ended")


async def _chat(session: aiohttp.ClientSession, prompt: str, max_tokens: int, console: Console) -> str:
    """Streams the answer onto the console, token by token, and returns the request's id."""
    async with session.get("/v1/models") as answer:
        model = (await answer.json())["data"][0]["id"]
    console.print(f"[bold]{model.rpartition('/')[2]}[/]  ", end="")
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
    }
    async with session.post("/v1/chat/completions", json=body) as answer:
        if answer.status != 200:
            raise click.ClickException(f"the chat was answered with {answer.status}: {await answer.text()}")
        async for line in answer.content:
            if line.startswith(b"data: {"):
                console.print(_text_of(json.loads(line[6:])), end="", markup=False, soft_wrap=True)
        return answer.headers["x-request-id"]


def _text_of(chunk: dict[str, Any]) -> str:
    if "error" in chunk:
        raise click.ClickException(chunk["error"]["message"])
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
