"""The fault matrix between real processes. Here every fault of the transports that need no package, at most moments;
`python -m benchmarks.faults` plays all of it for every transport and prints the table.
"""

from __future__ import annotations

import random

import pytest

from kvtransfer import registry
from kvtransfer.registry import TRANSPORTS
from tests.support.fault_lab.cells import CHUNK_OF, Cell, Fault, Moment, Side, all_cells
from tests.support.fault_lab.play import lab

SLOW = (Fault.STOP, Fault.DELAYED)
"""Each costs its own time; one moment of each is played here."""
NUM_TRANSFERS = 10_000
FAULTY_SHARE = 0.05
STOPPED_S = 0.8
"""In the marathon: longer than the progress timeout."""


def played_here(cell: Cell) -> bool:
    return cell.fault not in SLOW or cell.moment is Moment.MIDDLE


def test_the_matrix_has_every_fault_on_either_side_at_four_moments() -> None:
    cells = list(all_cells("TCP"))
    assert len(cells) == len(set(cells)) == len(Fault) * len(Side) * len(Moment) == 64
    assert {moment for moment in Moment if moment not in CHUNK_OF} == {Moment.BEFORE_ACK}


@pytest.mark.timeout(240)
async def test_no_fault_makes_a_wrong_token_a_leak_or_a_hang(transport_name: str) -> None:
    complaints = []
    async with lab(transport_name) as ours:
        for cell in filter(played_here, all_cells(transport_name)):
            verdict = await ours.play(cell)
            if verdict.was_only_late:  # The machine's doing, perhaps; never so twice.
                verdict = await ours.play(cell)
            complaints += [f"{cell}: {complaint}" for complaint in verdict.complaints]
    assert complaints == [], "\n".join(complaints)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("transport", [name for name in TRANSPORTS if name != "MPI" and registry.missing(name) is None])
async def test_ten_thousand_transfers_with_faults_leave_nothing(transport: str) -> None:
    """MPI is left out: after a kill its world is another one, and both processes with it, so that nobody's books could
    be compared."""
    dice = random.Random(transport)
    cells = list(all_cells(transport))
    complaints = []
    async with lab(transport, stopped_s=STOPPED_S) as ours:
        for _ in range(20):
            complaints += await ours.succeed()
        at_first = await ours.held()
        for number in range(NUM_TRANSFERS):
            if dice.random() < FAULTY_SHARE:
                cell = dice.choice(cells)
                complaints += [f"{number}, {cell}: {each}" for each in (await ours.play(cell)).complaints]
            else:
                complaints += [f"{number}: {each}" for each in await ours.succeed()]
        at_last = await ours.held()
    assert complaints == []
    assert at_last["source"]["transfers"] == 0
    for process, before in at_first.items():
        after = at_last[process]
        assert after["mapped_bytes"] == before["mapped_bytes"], process
        assert after["descriptors"] <= before["descriptors"] + 8, f"{process}: {before} {after}"
        assert after["threads"] <= before["threads"] + 8, f"{process}: {before} {after}"
