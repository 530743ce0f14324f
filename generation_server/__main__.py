"""`python -m generation_server MODEL`"""

from __future__ import annotations

from disaggregated.config.server import ServerConfig
from disaggregated.config.server_cli import server_command
from disaggregated.engine.serving.process_life import run_server
from generation_server.role import GenerationRole
from kvtransfer import Preference, Region


def main(config: ServerConfig) -> int:
    transceiver = config.cache_transceiver_config
    Preference(transceiver.backend, transceiver.fallback).check()  # Before minutes go by in which weights are loaded.
    return run_server(config, allocate=lambda layout: Region.allocate(layout.pool_bytes), make_role=GenerationRole)


if __name__ == "__main__":
    server_command("generation", main)()
