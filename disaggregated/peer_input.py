"""What another process says, before we count on it: numbers that a comparison or a timer would choke on, and names
that would be kept.

The orchestrator checks what clients send; this is for who speaks to a server directly, by mistake or on purpose.
"""

from __future__ import annotations

import math
from typing import Final

from disaggregated.errors import InvalidRequest

NAME_CHARACTERS_MAX: Final = 256
SECONDS_MAX: Final = 7 * 86_400.0


def checked_name(text: str, field: str) -> str:
    """An id that we keep, log and compare. Raises InvalidRequest."""
    if len(text) > NAME_CHARACTERS_MAX:
        raise InvalidRequest(f"{field} has {len(text)} characters, {NAME_CHARACTERS_MAX} are allowed", param=field)
    return text


def checked_seconds(value: float, field: str) -> float:
    """A time to wait: at least 0, and no more than a week. Raises InvalidRequest, also for what is no number."""
    if not 0.0 <= value <= SECONDS_MAX:  # False for a NaN, which no other comparison finds.
        raise InvalidRequest(f"{field} is {value}, it must be between 0 and {SECONDS_MAX:g} seconds", param=field)
    return value


def checked_number(value: float, field: str, *, low: float, high: float = math.inf) -> float:
    """A finite number within bounds. Raises InvalidRequest."""
    if not (math.isfinite(value) and low <= value <= high):
        limit = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise InvalidRequest(f"{field} is {value}, it must be {limit}", param=field)
    return value
