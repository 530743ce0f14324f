"""Goodput under five times too much, in virtual time: the figures of docs/admission.md, the same on every machine.

python -m benchmarks.overload
"""

from __future__ import annotations

from typing import Final

from tests.sim.test_overload import CAPACITY, SECONDS, storm
from tests.support.virtual_time import run_in_virtual_time

SEEDS: Final = range(4)
LOADS: Final = (0.8, 1.0, 1.2)
OVERLOAD: Final = 5.0


def main() -> None:
    for seed in SEEDS:
        best = max(run_in_virtual_time(storm(seed, load * CAPACITY)).goodput for load in LOADS)
        tally = run_in_virtual_time(storm(seed, OVERLOAD * CAPACITY))
        in_vain = tally.begun_in_vain / (tally.good + tally.begun_in_vain)
        print(
            f"seed {seed}, {SECONDS:g} s: best {best:.1f}/s at {min(LOADS):g} to {max(LOADS):g} times, "
            f"{tally.goodput:.1f}/s at {OVERLOAD:g} times; {in_vain:.1%} of what was begun was in vain"
        )


if __name__ == "__main__":
    main()
