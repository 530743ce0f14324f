"""The fault matrix: every transport, every fault, on either side, at four moments of a transfer. Prints the table.

    python -m benchmarks.faults                  every transport that this machine has
    python -m benchmarks.faults TCP SHM          these

Source and destination are processes of their own; what passes between them passes through relays that know the protocol
(tests/support/fault_lab). A cell holds when the outcome was there in time, no wrong byte landed, nothing was written
into blocks that had another owner by then, the source had every block back, and the next transfer succeeded.
"""

from __future__ import annotations

import asyncio
import collections
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from benchmarks import report
from disaggregated.security.membership import Membership, join
from disaggregated.security.secret import VARIABLE, ClusterSecret
from kvtransfer import negotiate, registry
from tests.support.fault_lab.cells import Cell, Fault, Moment, Side, Verdict, all_cells
from tests.support.fault_lab.play import lab

RESULT: Final = Path(__file__).parent / "results" / "fault-matrix.md"


async def play(transport: str) -> list[Verdict]:
    found = []
    async with lab(transport) as ours:
        for cell in all_cells(transport):
            verdict = await ours.play(cell)
            found.append(verdict)
            for complaint in verdict.complaints:
                print(f"!! {cell}: {complaint}", flush=True)
    return found


def usable() -> list[str]:
    """MPI's processes are launched by the lab, so that being outside of its world here is no lack."""
    names = [name for name in negotiate.BEST_FIRST if name in registry.TRANSPORTS]
    return [name for name in names if name == "MPI" or registry.missing(name) is None]


def lines(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """One table a transport: a row a fault and side, a column a moment."""
    by_cell = {verdict.cell: verdict for verdict in verdicts}
    for transport in dict.fromkeys(verdict.cell.transport for verdict in verdicts):
        yield f"## {transport}"
        yield ""
        yield f"| fault | side | {' | '.join(Moment)} |"
        yield "|---|---|" + "---|" * len(Moment)
        for fault in Fault:
            for side in Side:
                row = [_word(by_cell[Cell(transport, fault, side, moment)]) for moment in Moment]
                yield f"| {fault} | {side} | {' | '.join(row)} |"
        yield ""


def _word(verdict: Verdict) -> str:
    return f"{'' if verdict.is_well else '**FAILS** '}{verdict.outcome}, {verdict.found_s * 1000:.0f} ms"


def summary(verdicts: Sequence[Verdict]) -> Iterator[str]:
    well = collections.Counter(verdict.cell.transport for verdict in verdicts if verdict.is_well)
    every = collections.Counter(verdict.cell.transport for verdict in verdicts)
    for transport, count in every.items():
        yield f"- {transport}: {well[transport]} of {count} cells hold"


def join_a_cluster() -> None:
    """With a secret, as servers have one: what would break a handshake breaks a cell. Actors inherit it."""
    os.environ[VARIABLE] = secrets.token_hex(16)
    join(Membership(secret=ClusterSecret(os.environ[VARIABLE])))


def main() -> int:
    join_a_cluster()
    verdicts = []
    for transport in sys.argv[1:] or usable():
        print(f"== {transport}", flush=True)
        verdicts += asyncio.run(play(transport))
    text = "\n".join(
        [
            "# The fault matrix of the transfer layer",
            "",
            report.origin(),
            "",
            "Each cell: what the destination was told, and how long after the fault (of a killed receiver: until the "
            "source had its blocks back). A frozen receiver can be told only after its 3 s. `landed` means that every "
            "byte is the one that was sent.",
            "",
            *summary(verdicts),
            "",
            *lines(verdicts),
        ]
    )
    RESULT.write_text(text)
    print(text)
    return 0 if all(verdict.is_well for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
