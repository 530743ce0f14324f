"""What a configuration says reaches both ends of a transfer."""

from __future__ import annotations

import dataclasses

import pytest

from disaggregated.config.server import CacheTransceiverConfig, ServerConfig
from disaggregated.kv_layout import KVLayout
from kvtransfer.configured import destination_options, identity_of, source_options
from kvtransfer.destination.options import IN_FLIGHT_BYTES, DestinationOptions
from tests.support.kv_pools import SMALL


@dataclasses.dataclass
class Process:
    instance_id: str = "context-7"
    epoch: int = 7


@dataclasses.dataclass
class Engine:
    layout: KVLayout
    fingerprint: str = "a-model"
    device: str = "cuda:1"


@dataclasses.dataclass
class Server:
    """What of a loaded server this layer looks at."""

    config: ServerConfig
    memory_layout: KVLayout = dataclasses.replace(SMALL, num_blocks=8)
    identity: Process = dataclasses.field(default_factory=Process)
    loaded: Engine = dataclasses.field(default_factory=lambda: Engine(SMALL))


def server(**transceiver: object) -> Server:
    config = CacheTransceiverConfig(**transceiver)  # type: ignore[arg-type]
    return Server(ServerConfig(role="context", model="m", host="localhost", cache_transceiver_config=config))


def test_a_pool_is_known_by_its_process_its_model_and_the_memory_that_transports_see() -> None:
    found = identity_of(server())
    assert (found.instance_id, found.epoch, found.fingerprint, found.device) == ("context-7", 7, "a-model", "cuda:1")
    assert found.layout.num_blocks == 8


def test_a_source_binds_what_its_server_binds_and_leases_as_long_as_it_is_told() -> None:
    options = source_options(server(lease_s=3.0, backend="TCP", fallback=True))
    assert (options.lease_s, options.host) == (3.0, "127.0.0.1")
    assert (options.preference.backend, options.preference.fallback) == ("TCP", True)


def test_a_destination_judges_its_quarantine_by_the_whole_pool() -> None:
    options = destination_options(server(kv_transfer_timeout_ms=1500, progress_timeout_s=0.25, max_tokens_in_buffer=9))
    assert options.limits is not None
    assert options.limits.num_blocks == SMALL.num_blocks
    assert (options.stall_timeout_s, options.progress_timeout_s, options.max_tokens_in_buffer) == (1.5, 0.25, 9)


@pytest.mark.parametrize("unbounded", [None, 0])
def test_a_buffer_of_no_size_slows_nobody_down(unbounded: int | None) -> None:
    options = DestinationOptions(max_tokens_in_buffer=unbounded)
    assert options.in_flight_bytes(SMALL) == IN_FLIGHT_BYTES
    assert options.part_tokens(SMALL) * SMALL.token_bytes > 1 << 20


def test_a_buffer_of_some_tokens_is_as_many_bytes_as_they_have() -> None:
    options = DestinationOptions(max_tokens_in_buffer=9)
    assert (options.in_flight_bytes(SMALL), options.part_tokens(SMALL)) == (9 * SMALL.token_bytes, 9)
