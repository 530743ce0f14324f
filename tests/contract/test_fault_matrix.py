"""The fault matrix between real processes. Here every fault of the transports that need no package, at most moments;
`python -m benchmarks.faults` plays all of it for every transport and prints the table.
"""

from __future__ import annotations

import random

import pytest

from kvtransfer import registry
from kvtransfer.registry import TRANSPORTS
from tests.support.fault_lab.cells import CHUNK_OF, Cell, Fault, Moment, Side, Verdict, all_cells
from tests.support.fault_lab.play import Lab, Pace, lab

SLOW = (Fault.KILL, Fault.STOP, Fault.DELAYED)
"""Each costs its own time, or a process that has to be started again; one moment of each is played here."""
NUM_TRANSFERS = 10_000
FAULTY_SHARE = 0.05
UNHURRIED = Pace(progress_timeout_s=1.5, found_within_s=8.0, stopped_s=2.0)
"""What is measured of time is the benchmark's affair."""
NUM_ATTEMPTS = 3
BRISK = Pace(stopped_s=0.8)
"""Of the marathon: longer than the progress timeout."""


def played_here(cell: Cell) -> bool:
    return cell.fault not in SLOW or cell.moment is Moment.MIDDLE


def test_the_matrix_has_every_fault_on_either_side_at_four_moments() -> None:
    cells = list(all_cells("TCP"))
    assert len(cells) == len(set(cells)) == len(Fault) * len(Side) * len(Moment) == 64
    assert {moment for moment in Moment if moment not in CHUNK_OF} == {Moment.BEFORE_ACK}


async def played(ours: Lab, cell: Cell) -> Verdict:
    """What only takes long may be the machine's doing, but not again and again."""
    for _ in range(NUM_ATTEMPTS):
        verdict = await ours.play(cell)
        if not verdict.may_be_the_machines:
            break
    return verdict


@pytest.mark.timeout(400)
async def test_no_fault_makes_a_wrong_token_a_leak_or_a_hang(transport_name: str) -> None:
    async with lab(transport_name, UNHURRIED) as ours:
        verdicts = [await played(ours, cell) for cell in all_cells(transport_name) if played_here(cell)]
    complaints = [f"{verdict.cell}: {each}" for verdict in verdicts for each in verdict.complaints]
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
    async with lab(transport, BRISK) as ours:
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
