"""Who can change the number of servers: the local launcher, or nobody when somebody else runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol


class Scaler(Protocol):
    async def scale(self, role: str, count: int) -> None:
        """Returns once `count` servers of the role are ready and the others are drained and gone.

        Raises:
            InvalidRequest: no such role, or a count that cannot be.
            DisaggregatedError: a server could not be started.
        """

    def describe(self) -> Sequence[Mapping[str, object]]:
        """Every local process as JSON-able values: `name`, `role`, `phase`, `last_exit` and more."""
