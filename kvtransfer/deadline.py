"""A deadline is made once, where a request enters, and passed down to every wait below."""

from __future__ import annotations

import dataclasses
import time

from disaggregated.errors import TransferTimeout


@dataclasses.dataclass(frozen=True, slots=True)
class Deadline:
    """A point on this machine's monotonic clock; only relative seconds ever cross the wire."""

    at_s: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    def left_s(self) -> float:
        """Seconds until it passes, never negative."""
        return max(0.0, self.at_s - time.monotonic())

    def no_later_than(self, seconds: float) -> Deadline:
        """The earlier of this deadline and `seconds` from now."""
        return Deadline(min(self.at_s, time.monotonic() + seconds))

    def check(self, waiting_for: str) -> None:
        """Raises TransferTimeout when it has passed."""
        if self.left_s() == 0.0:
            raise TransferTimeout(f"the deadline passed while waiting for {waiting_for}")
