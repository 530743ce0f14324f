"""The fault matrix: what may go wrong, on whose side, and when."""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Iterator
from typing import Final


class Fault(enum.StrEnum):
    KILL = "kill -9"
    STOP = "SIGSTOP 3 s"
    CUT = "connection cut"
    CORRUPT = "corrupt bytes"
    TRUNCATED = "truncated"
    DUPLICATED = "duplicated"
    REORDERED = "reordered"
    DELAYED = "delayed"


class Side(enum.StrEnum):
    """Whose process is hit, or whose bytes are."""

    SENDER = "sender"
    RECEIVER = "receiver"


class Moment(enum.StrEnum):
    BEFORE_FIRST = "before first chunk"
    MIDDLE = "middle chunk"
    LAST = "last chunk"
    BEFORE_ACK = "before ack"


NUM_CHUNKS: Final = 4
CHUNK_OF: Final = {Moment.BEFORE_FIRST: 0, Moment.MIDDLE: NUM_CHUNKS // 2, Moment.LAST: NUM_CHUNKS - 1}
"""The chunk whose reading a moment names; before the acknowledgement all have been read."""


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    transport: str
    fault: Fault
    side: Side
    moment: Moment

    @property
    def chunk(self) -> int | None:
        return CHUNK_OF.get(self.moment)

    def __str__(self) -> str:
        return f"{self.transport}: {self.fault}, {self.side}, {self.moment}"


def all_cells(transport: str) -> Iterator[Cell]:
    """Those after which both processes live come first, so that few have to be started again."""
    for fault, side, moment in itertools.product(reversed(Fault), Side, Moment):
        yield Cell(transport, fault, side, moment)


HARM: Final = "harm: "
"""How a complaint begins that no machine is too slow for: bytes are wrong, or where nobody wanted them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    cell: Cell
    outcome: str
    """`landed`, or the error that the destination was told."""
    found_s: float
    """From the fault to the outcome; of a killed receiver, until the source had its blocks back."""
    complaints: tuple[str, ...]
    """Everything that was not as it must be."""

    @property
    def is_well(self) -> bool:
        return not self.complaints

    @property
    def may_be_the_machines(self) -> bool:
        """Something took too long, or was given up for that reason, and nothing came to harm."""
        return bool(self.complaints) and not any(complaint.startswith(HARM) for complaint in self.complaints)
