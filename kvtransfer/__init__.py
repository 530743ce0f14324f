"""Moves KV blocks from the pool that computed them to the pool that will decode from them; knows no model and no HTTP.

    context server                                  generation server
    TransferSource.open / publish / finish          TransferDestination.pull

Read in this order: region, transport, frames, listener, link, shm, tcp; machine, lease, source; peer, pull,
destination.
"""

from kvtransfer.destination import TransferDestination
from kvtransfer.negotiate import check_backend
from kvtransfer.peer import PeerStatistics, Ticket
from kvtransfer.pull import Landed
from kvtransfer.region import Region
from kvtransfer.source import TransferSource

__all__ = [
    "Landed",
    "PeerStatistics",
    "Region",
    "Ticket",
    "TransferDestination",
    "TransferSource",
    "check_backend",
]
