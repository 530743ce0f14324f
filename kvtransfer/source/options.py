"""How a source serves, apart from what it serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Sequence

from disaggregated.block_hash import BlockHash
from kvtransfer.negotiate import Preference
from kvtransfer.transport import SourceEndpoint

Lend = Callable[[str, Sequence[BlockHash]], Awaitable[None]]
"""Opens and finishes the transfer of that id: of what is found of these blocks, from the first on."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SourceOptions:
    lease_s: float = 30.0
    """Without a sign of life from its destination a transfer ends, and its blocks go back."""
    host: str = "127.0.0.1"
    """What our sockets bind."""
    preference: Preference = Preference()
    lend: Lend | None = None
    """Awaited when a destination asks for blocks by their hashes; None: transfers are opened by the server alone."""
    endpoints: Sequence[SourceEndpoint] | None = None
    """Instead of those that `preference` asks for."""
