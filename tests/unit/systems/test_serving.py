"""Systems under test as processes: started, waited for, and gone whatever happens."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import aiohttp
import psutil
import pytest

from benchmarks.systems.serving import Command, SystemFailed, free_port, running

SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("child", child.pid, flush=True)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""


def command(code: str, port: int) -> Command:
    cores = (min(os.sched_getaffinity(0)),)
    words = [sys.executable, "-c", code, str(port)]
    return Command(words=words, health_url=f"http://127.0.0.1:{port}/health", cores=cores)


async def test_a_system_is_healthy_inside_the_block_and_gone_after_it(tmp_path: Path) -> None:
    port = free_port()
    async with running([command(SERVER, port)], tmp_path, start_timeout_s=30) as remarks:
        assert remarks == []
        child = psutil.Process(int((tmp_path / "0.log").read_text().split()[1]))
        assert child.cpu_affinity() == [min(os.sched_getaffinity(0))]
    _, still_there = psutil.wait_procs([child], timeout=10)
    assert not still_there
    async with aiohttp.ClientSession() as http:
        with pytest.raises(aiohttp.ClientConnectionError):
            await http.get(f"http://127.0.0.1:{port}/health")


async def test_a_system_that_ends_at_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    broken = command("raise SystemExit('no such model')", free_port())
    with pytest.raises(ExceptionGroup) as failed:
        async with running([broken], tmp_path, start_timeout_s=30):
            pass
    [error] = failed.value.exceptions
    assert isinstance(error, SystemFailed)
    assert "exit code 1: no such model" in str(error)


async def test_a_system_that_is_never_healthy_ends_at_its_deadline(tmp_path: Path) -> None:
    silent = command("import time; print('up', flush=True); time.sleep(60)", free_port())
    with pytest.raises(TimeoutError):
        async with running([silent], tmp_path, start_timeout_s=1.5):
            pass
