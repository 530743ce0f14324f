"""Prints the tables of docs/transfer-life-cycle.md: `python -m kvtransfer.document` (part of `make docs`).

Only what lies between the two markers is printed anew; the words around it are written by hand.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Mapping
from typing import Final

from kvtransfer.machine import (
    NEXT_DESTINATION,
    NEXT_SOURCE,
    CancelResult,
    DestinationPhase,
    DestinationTransfer,
    SourcePhase,
)

PAGE: Final = pathlib.Path(__file__).resolve().parent.parent / "docs" / "transfer-life-cycle.md"
BEGIN: Final = "<!-- Printed by `make docs` from kvtransfer/machine.py; change it there. -->\n"
END: Final = "<!-- End of what is printed. -->\n"

_WHEN: Final[Mapping[CancelResult, str]] = {
    CancelResult.NOT_FOUND: "no such transfer is here",
    CancelResult.ALREADY_COMPLETE: "it had ended before, well or not",
    CancelResult.CANCELLED_BEFORE_ADVERTISE: "the source had not been asked for anything",
    CancelResult.CANCELLED_WHILE_QUIET: "between two reads",
    CancelResult.REQUESTED_IN_FLIGHT: "a read was told to stop and has not ended",
    CancelResult.NOT_CANCELLABLE: "a read is running that its library cannot stop",
    CancelResult.BACKEND_UNHEALTHY: "a read was told to stop so long ago that it is stuck",
}


def tables() -> str:
    return "\n".join([_source(), _destination(), _results()])


def _source() -> str:
    rows = [f"| `{phase}` | {_names(NEXT_SOURCE[phase])} |" for phase in SourcePhase]
    return "\n".join(["| source | may be followed by |", "|---|---|", *rows, ""])


def _destination() -> str:
    rows = []
    for phase in DestinationPhase:
        transfer = DestinationTransfer("", phase=phase)
        blocks = "can be written into" if transfer.is_writable else "quiet"
        rows.append(f"| `{phase}` | {_names(NEXT_DESTINATION[phase])} | {blocks} |")
    return "\n".join(["| destination | may be followed by | its blocks are |", "|---|---|---|", *rows, ""])


def _results() -> str:
    rows = []
    for result in CancelResult:
        may_free = "yes" if result.may_free else "**no**"
        rows.append(f"| `{result.name}` | {_WHEN[result]} | {may_free} |")
    return "\n".join(["| a cancel finds | because | may its blocks be freed? |", "|---|---|---|", *rows, ""])


def _names(phases: frozenset[SourcePhase] | frozenset[DestinationPhase]) -> str:
    return ", ".join(f"`{phase}`" for phase in sorted(phases)) or "nothing: it is over"


def printed(page: str) -> str:
    """`page` with fresh tables."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(printed(PAGE.read_text()))
    sys.stdout.write(f"{PAGE}\n")
