"""`status` and `scale` against an orchestrator that answers from memory, over real HTTP."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import click
import pytest

from orchestrator.remote_control import scale, status

Answers = dict[str, tuple[int, Any]]
Serve = Callable[[Answers], str]

WORKER = {
    "worker_id": "context-7-aa",
    "host": "127.0.0.1",
    "port": 8001,
    "role": "context",
    "standing": "ready",
    "reason": "",
    "requests": 2,
    "blocks": 128,
    "blocks_free": 100,
}
WAITING = {
    "name": "generation-0",
    "role": "generation",
    "phase": "waiting",
    "phase_s": 3.2,
    "last_exit": "signal 9",
}


@pytest.fixture
def serve() -> Iterator[Serve]:
    stops: list[Callable[[], None]] = []

    def start(answers: Answers) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                code, body = answers[self.path]
                self.send_response(code)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                self.do_GET()

            def log_message(self, *_: object) -> None: ...

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        stops.append(stop)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for stop in stops:
        stop()


def test_status_shows_servers_in_columns_and_the_processes_that_are_not_ready(serve: Serve) -> None:
    info = {"current_workers": {"context_servers": [WORKER], "generation_servers": []}, "processes": [WAITING]}
    error = {"error": {"message": "no generation server is ready"}}
    url = serve({"/health": (503, error), "/cluster_info": (200, info)})
    lines, is_serving = status(url)
    assert not is_serving
    assert lines == [
        f"{url}: not serving: no generation server is ready",
        "context     127.0.0.1:8001  ready    2 requests  100 of 128 blocks free",
        "generation  generation-0    waiting  for 3 s     last one ended with signal 9",
    ]


def test_a_server_with_a_long_reason_leaves_the_columns_of_the_others_alone(serve: Serve) -> None:
    strange = WORKER | {"port": 8002, "standing": "connecting", "reason": "it has another cluster secret than we: " * 3}
    url = serve({"/health": (200, {}), "/cluster_info": (200, {"current_workers": {"context": [WORKER, strange]}})})
    _, well, unwell = status(url)[0]
    assert well == "context  127.0.0.1:8001  ready       2 requests  100 of 128 blocks free"
    assert unwell.startswith("context  127.0.0.1:8002  connecting  it has another cluster secret than we: ")


def test_status_of_a_deployment_without_servers_is_one_line(serve: Serve) -> None:
    url = serve({"/health": (200, {}), "/cluster_info": (200, {"current_workers": {}})})
    assert status(url) == ([f"{url}: serving"], True)


def test_a_refused_scale_is_told_in_the_orchestrators_words(serve: Serve) -> None:
    url = serve({"/cluster/scale": (400, {"error": {"message": "context: must be between 0 and 256, is 999"}})})
    with pytest.raises(click.ClickException, match=r"^context: must be between 0 and 256, is 999$"):
        scale(url, {"context": 999}, timeout_s=5)


def test_somebody_else_at_the_port_is_told_by_his_status(serve: Serve) -> None:
    url = serve({"/cluster/scale": (404, "what?")})
    with pytest.raises(click.ClickException, match=r"^it answered 404$"):
        scale(url, {"context": 1}, timeout_s=5)
