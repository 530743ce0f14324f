"""How a destination pulls, apart from what and where to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

from disaggregated.kv_layout import KVLayout
from kvtransfer.destination.quarantine import QuarantineLimits
from kvtransfer.negotiate import Preference
from kvtransfer.transport import PROGRESS_TIMEOUT_S, DestinationTransport

PART_BYTES: Final = 64 << 20
"""Of one read at most: asking for it costs as much as moving a megabyte or two of it. A stop waits for none of them."""
STAGED_PART_BYTES: Final = 16 << 20
"""Of a read into a region beside the pool, which has to be that large."""
READERS_MAX: Final = 16
"""Threads. A read beyond waits for one, within its deadline; a dead source holds one for the progress timeout."""
IN_FLIGHT_BYTES: Final = 2 * READERS_MAX * PART_BYTES
"""Of all transfers, unless `max_tokens_in_buffer` says otherwise: no read gets less than a whole part then."""
STALL_TIMEOUT_S: Final = 60.0
IDLE_MAX_S: Final = 300.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DestinationOptions:
    preference: Preference = Preference()
    max_tokens_in_buffer: int | None = None
    """Bounds what is under way at once, of all transfers together; but one block of one layer always may be, and one
    whole block where blocks are staged or converted. None or 0: it slows nobody down."""
    progress_timeout_s: float = PROGRESS_TIMEOUT_S
    """A source that moves no byte and answers nothing for so long is lost."""
    stall_timeout_s: float = STALL_TIMEOUT_S
    """A transfer of which nothing more is published for so long, once something was, has failed."""
    idle_max_s: float = IDLE_MAX_S
    """A source that nobody pulls from for so long is let go of; the next pull connects within milliseconds."""
    limits: QuarantineLimits | None = None
    """Of the quarantine in the pool; None: the usual ones, for a pool that is the region itself."""
    transports: Sequence[DestinationTransport] = ()
    """Instead of ours, if there are any."""

    def in_flight_bytes(self, layout: KVLayout) -> int:
        return self.max_tokens_in_buffer * layout.token_bytes if self.max_tokens_in_buffer else IN_FLIGHT_BYTES

    def part_tokens(self, layout: KVLayout) -> int:
        """Of a foreign source, to be staged at a time."""
        return self.max_tokens_in_buffer or STAGED_PART_BYTES // layout.token_bytes
