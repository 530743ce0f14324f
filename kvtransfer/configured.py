"""What a server's configuration says of its transfers, as the two ends want to hear it."""

from __future__ import annotations

from typing import Protocol

from disaggregated.config.server import ServerConfig
from disaggregated.kv_layout import KVLayout
from kvtransfer.destination.options import DestinationOptions
from kvtransfer.destination.quarantine import QuarantineLimits
from kvtransfer.negotiate import Preference
from kvtransfer.pool_identity import PoolIdentity
from kvtransfer.source.options import Lend, SourceOptions


class _Process(Protocol):
    @property
    def instance_id(self) -> str: ...
    @property
    def epoch(self) -> int: ...


class _Engine(Protocol):
    @property
    def fingerprint(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def layout(self) -> KVLayout: ...


class Server(Protocol):
    """Of which this layer knows no more."""

    @property
    def config(self) -> ServerConfig: ...
    @property
    def identity(self) -> _Process: ...
    @property
    def loaded(self) -> _Engine: ...
    @property
    def memory_layout(self) -> KVLayout:
        """Of the memory that transports see: the pool, or a staging region."""


def identity_of(server: Server) -> PoolIdentity:
    return PoolIdentity.whole(
        server.memory_layout,
        instance_id=server.identity.instance_id,
        epoch=server.identity.epoch,
        fingerprint=server.loaded.fingerprint,
        device=_with_number(server.loaded.device),
    )


def source_options(server: Server, *, lend: Lend | None = None) -> SourceOptions:
    transceiver = server.config.cache_transceiver_config
    return SourceOptions(
        lease_s=transceiver.lease_s,
        host="127.0.0.1" if server.config.host == "localhost" else server.config.host,
        preference=Preference(transceiver.backend, transceiver.fallback),
        lend=lend,
    )


def destination_options(server: Server) -> DestinationOptions:
    transceiver = server.config.cache_transceiver_config
    return DestinationOptions(
        preference=Preference(transceiver.backend, transceiver.fallback),
        max_tokens_in_buffer=transceiver.max_tokens_in_buffer,
        progress_timeout_s=transceiver.progress_timeout_s,
        stall_timeout_s=transceiver.kv_transfer_timeout_ms / 1000,
        limits=QuarantineLimits(num_blocks=server.loaded.layout.num_blocks),
    )


def _with_number(device: str) -> str:
    """What torch calls `cuda` is its first one; whoever reads of a link wants to know which."""
    return "cuda:0" if device == "cuda" else device
