"""Requests and tokens a minute, by API key: token buckets that hold a minute's worth. Pure but for the levels' store.

A request is charged what it is expected to take when it comes, and the difference when it is over; so a level may fall
below nothing, and whoever took more than was thought waits longer for the next one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final, Protocol

from disaggregated.errors import QuotaExceeded
from orchestrator.admission.api_keys import ApiKey
from orchestrator.admission.pace import whole_seconds

_MINUTE_S: Final = 60.0

Change = Callable[["Level | None"], "Level"]


@dataclasses.dataclass(frozen=True, slots=True)
class Level:
    amount: float
    at_s: float
    """On a clock that all processes of the machine share."""


class Levels(Protocol):
    """Where the levels are: in this process, or in memory that several orchestrators share."""

    def update(self, name: str, change: Change) -> Level:
        """Replace a level by what `change` makes of it (None: there is none yet); nobody else comes in between."""


class OwnLevels:
    def __init__(self) -> None:
        self._levels: dict[str, Level] = {}

    def update(self, name: str, change: Change) -> Level:
        self._levels[name] = level = change(self._levels.get(name))
        return level


@dataclasses.dataclass(frozen=True, slots=True)
class Remaining:
    """For the headers that tell a client where it stands."""

    what: str
    limit: int
    left: int
    full_in_s: float


class Quotas:
    def __init__(self, levels: Levels, *, clock: Callable[[], float]) -> None:
        self._levels = levels
        self._clock = clock

    def take(self, key: ApiKey, what: str, amount: float) -> None:
        """what: "requests" or "tokens".

        Raises:
            QuotaExceeded: nothing was taken; tells when the same will be granted, if nobody else asks meanwhile.
        """
        limit = _limit(key, what)
        if limit is None:
            return
        wait_s = 0.0

        def change(level: Level | None) -> Level:
            nonlocal wait_s
            now = _refilled(level, limit, self._clock())
            wanted = min(amount, float(limit))  # More than a minute's worth is granted to whoever has a minute's worth.
            wait_s = max(0.0, wanted - now.amount) * _MINUTE_S / limit
            return now if wait_s > 1e-6 else Level(now.amount - amount, now.at_s)

        self._levels.update(_bucket(key, what), change)
        if wait_s > 1e-6:
            raise QuotaExceeded(
                f"{key.name} may take {limit} {what} a minute, and has taken them; come back in {wait_s:.1f} s",
                retry_after_s=whole_seconds(wait_s),
            )

    def settle(self, key: ApiKey, what: str, amount: float) -> None:
        """It took `amount` more than was charged, or less where that is negative."""
        limit = _limit(key, what)
        if limit is None or not amount:
            return

        def change(level: Level | None) -> Level:
            now = _refilled(level, limit, self._clock())
            return Level(min(now.amount - amount, float(limit)), now.at_s)

        self._levels.update(_bucket(key, what), change)

    def remaining(self, key: ApiKey) -> list[Remaining]:
        found = []
        for what in ("requests", "tokens"):
            if (limit := _limit(key, what)) is not None:
                level = _refilled(self._levels.update(_bucket(key, what), _keep(limit)), limit, self._clock())
                left = max(0, int(level.amount))
                found.append(Remaining(what, limit, left, (limit - level.amount) * _MINUTE_S / limit))
        return found


def _limit(key: ApiKey, what: str) -> int | None:
    return key.requests_per_minute if what == "requests" else key.tokens_per_minute


def _bucket(key: ApiKey, what: str) -> str:
    return f"{what} of {key.name}"


def _refilled(level: Level | None, limit: int, now_s: float) -> Level:
    if level is None:
        return Level(float(limit), now_s)
    gained = max(0.0, now_s - level.at_s) * limit / _MINUTE_S
    return Level(min(float(limit), level.amount + gained), max(now_s, level.at_s))


def _keep(limit: int) -> Change:
    return lambda level: Level(float(limit), 0.0) if level is None else level
