"""Every transport that is part of this product: its name in configuration files, and where its code is.

A transport's module is imported when somebody asks for it by name, and the library behind it only when an endpoint or a
link is made. So a server that uses TCP needs neither UCX nor torch, and the list of what is missing costs nothing.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Final, Protocol, cast

from disaggregated.kv_layout import KVLayout
from kvtransfer.region import Region
from kvtransfer.transport import DestinationTransport, OurEnd, SourceEndpoint


class TransportModule(Protocol):
    """What a module under `kvtransfer.transports` is, seen from here."""

    @property
    def NAME(self) -> str: ...

    def missing(self) -> str | None:
        """What this process lacks to use it: a package (and how to install it), a device; None when nothing."""

    def make_endpoint(self, region: Region, layout: KVLayout, *, epoch: int, host: str) -> SourceEndpoint:
        """`host` is what its sockets bind. Raises TransferError."""

    def make_transport(self, us: OurEnd) -> DestinationTransport:
        """Raises TransferError."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    name: str
    module: str
    extra: str | None
    """`pip install disaggregated[extra]`; None when it needs no package."""
    carries: str
    """How bytes travel, in a few words: for `disaggregated doctor` and the docs."""


TRANSPORTS: Final[Mapping[str, Listed]] = {
    listed.name: listed
    for listed in (
        Listed(
            name="SHM",
            module="kvtransfer.transports.shm",
            extra=None,
            carries="one memcpy out of the other process's sealed memory, on one host",
        ),
        Listed(
            name="TCP",
            module="kvtransfer.transports.tcp",
            extra=None,
            carries="sockets, between any two hosts",
        ),
        Listed(
            name="UCX",
            module="kvtransfer.transports.ucx",
            extra="ucx",
            carries="large messages over InfiniBand, RoCE or TCP, packed and unpacked at both ends",
        ),
        Listed(
            name="NIXL",
            module="kvtransfer.transports.nixl",
            extra="nixl",
            carries="one-sided reads out of the other process's memory, over InfiniBand, RoCE, CMA or TCP",
        ),
        Listed(
            name="NCCL",
            module="kvtransfer.transports.nccl",
            extra="nccl",
            carries="packed messages by torch.distributed (gloo), between any two hosts",
        ),
        Listed(
            name="MPI",
            module="kvtransfer.transports.mpi",
            extra="mpi",
            carries="packed messages between processes of one MPI launch, over the network that their MPI drives",
        ),
    )
}

FOREIGN: Final[Mapping[str, str]] = {
    "MOONCAKE": "NIXL or UCX use the same networks",
}
"""Names that other systems' files carry and that are not ours, with what to use instead."""


def load(name: str) -> TransportModule:
    """The module of a transport in the table."""
    return cast(TransportModule, importlib.import_module(TRANSPORTS[name].module))


def missing(name: str) -> str | None:
    """Why this process cannot use a transport of the table; None when it can."""
    return load(name).missing()
