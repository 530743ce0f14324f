"""A transport whose library is installed and cannot be loaded: the registry may name this module."""

from __future__ import annotations

from typing import Final

from disaggregated.errors import TransferError
from disaggregated.kv_layout import KVLayout
from kvtransfer.region import Region
from kvtransfer.transport import DestinationTransport, OurEnd, SourceEndpoint

NAME: Final = "BROKEN"


def missing() -> str | None:
    return None


def make_endpoint(region: Region, layout: KVLayout, *, epoch: int, host: str) -> SourceEndpoint:
    raise TransferError("its library cannot be loaded")


def make_transport(us: OurEnd) -> DestinationTransport:
    raise TransferError("its library cannot be loaded")
