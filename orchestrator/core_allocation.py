"""Which cores a local server computes on: each gets a share of its own for as long as the machine has one to give.

An engine whose threads share cores with another's loses far more than its half (its threads wait for each other at
every layer), so that servers are pinned unless the file says `num_threads` or `cpu_affinity` itself.
"""

from __future__ import annotations

from collections.abc import Sequence


class CoreAllocation:
    """Deals `cores` out in shares of equal size. A share whose owner is gone is dealt again; when there are more owners
    than shares, the shares with the fewest owners are shared."""

    def __init__(self, cores: Sequence[int], *, num_servers: int) -> None:
        assert cores, "a process runs on at least one core"
        num_servers = max(1, num_servers)
        whole_share, smaller_share = len(cores) // num_servers, (len(cores) - 1) // num_servers
        # The orchestrator gets a core where that costs each server a quarter of its own at most. It needs little of it.
        has_spare = len(cores) > num_servers and 4 * (whole_share - smaller_share) <= whole_share
        usable = len(cores) - 1 if has_spare else len(cores)
        self.share_size = max(1, usable // num_servers)
        num_shares = max(1, usable // self.share_size)
        self._shares = [tuple(cores[n * self.share_size : (n + 1) * self.share_size]) for n in range(num_shares)]
        self._owners: dict[str, int] = {}

    def take(self, owner: str) -> tuple[int, ...]:
        """The cores of `owner`, the same ones until it gives them back."""
        if owner not in self._owners:
            taken = list(self._owners.values())
            self._owners[owner] = min(range(len(self._shares)), key=taken.count)
        return self._shares[self._owners[owner]]

    def give_back(self, owner: str) -> None:
        self._owners.pop(owner, None)
