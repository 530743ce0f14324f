"""A server process without an engine: the same command line, ready line and exit codes, and it starts at once.

Its model's name says how it behaves: `well`, `crash` (exit code 1 before it is ready), `damaged` (exit code 4),
`silent` (never ready), `stubborn` (deaf to SIGTERM), `chatty` (a very long line before it is ready).
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from disaggregated.config.server import ServerConfig
from disaggregated.config.server_cli import server_command
from disaggregated.errors import ModelUnavailable


def main(config: ServerConfig) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN if config.model == "stubborn" else _end)
    if config.model == "crash":
        _say("it is a bad day")
        return 1
    if config.model == "damaged":
        raise ModelUnavailable("model.safetensors is damaged")
    if config.model == "chatty":
        _say("x" * 300_000)
    if config.model != "silent":
        _say(f"READY {config.role} 127.0.0.1:{1024 + os.getpid() % 60000} cores={config.cpu_affinity}")
    while True:
        signal.pause()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _end(*_: object) -> NoReturn:
    sys.exit(0)


if __name__ == "__main__":
    server_command("context", main)()
