"""Moves KV blocks from the pool that computed them to the pool that will decode from them; knows no model and no HTTP.

    context server                                  generation server
    TransferSource.open / publish / finish          TransferDestination.pull

To use it without the rest of the product: docs/transfer-library.md, whose two programs run as they stand.

Read in this order: region, transport, frames, listener, link, shm, tcp; machine, lease, source; peer, pull,
destination; staging, staged_source for pools in a device's memory, device_pool, cuda_ipc, device_source for two on one
host.
"""

from kvtransfer.destination.landed import Landed
from kvtransfer.destination.options import DestinationOptions
from kvtransfer.destination.peer import PeerStatistics, Ticket
from kvtransfer.destination.pending import PendingTransfer
from kvtransfer.destination.quarantine import Quarantine, QuarantineLimits
from kvtransfer.destination.transfer_destination import TransferDestination
from kvtransfer.device_pool import DevicePool, SharedPool
from kvtransfer.negotiate import Preference
from kvtransfer.pool_identity import PoolIdentity
from kvtransfer.region import Region
from kvtransfer.source.device_source import DeviceSource
from kvtransfer.source.options import SourceOptions
from kvtransfer.source.publisher import News, Publisher, TakesNews
from kvtransfer.source.staged_source import StagedSource
from kvtransfer.source.transfer_source import TransferSource
from kvtransfer.staging import DeviceCopier

__all__ = [
    "DestinationOptions",
    "DeviceCopier",
    "DevicePool",
    "DeviceSource",
    "Landed",
    "News",
    "PeerStatistics",
    "PendingTransfer",
    "PoolIdentity",
    "Preference",
    "Publisher",
    "Quarantine",
    "QuarantineLimits",
    "Region",
    "SharedPool",
    "SourceOptions",
    "StagedSource",
    "TakesNews",
    "Ticket",
    "TransferDestination",
    "TransferSource",
]
