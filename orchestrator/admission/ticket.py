"""What a request brings to the queue: whose it is, and by when it must have begun and ended."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Final

from disaggregated.errors import InvalidRequest

TIMEOUT_HEADER: Final = "x-request-timeout"
TTFT_HEADER: Final = "x-slo-ttft-ms"
TPOT_HEADER: Final = "x-slo-tpot-ms"
_SECONDS_MAX: Final = 86_400.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    """What the client asked for in headers; None where it said nothing."""

    timeout_s: float | None = None
    """From arrival to last token."""
    ttft_s: float | None = None
    tpot_s: float | None = None
    """Only counted, as met or missed: nothing is refused for it."""

    @classmethod
    def read(cls, headers: Mapping[str, str]) -> Objectives:
        """
        Raises:
            InvalidRequest: names the header and the limit.
        """
        if TIMEOUT_HEADER not in headers and TTFT_HEADER not in headers and TPOT_HEADER not in headers:
            return NO_OBJECTIVES
        return cls(
            timeout_s=_positive(headers, TIMEOUT_HEADER, unit_s=1.0),
            ttft_s=_positive(headers, TTFT_HEADER, unit_s=1e-3),
            tpot_s=_positive(headers, TPOT_HEADER, unit_s=1e-3),
        )


NO_OBJECTIVES: Final = Objectives()


def _positive(headers: Mapping[str, str], name: str, *, unit_s: float) -> float | None:
    text = headers.get(name)
    if text is None:
        return None
    try:
        value = float(text) * unit_s
    except ValueError:
        value = math.nan
    if not 0.0 < value <= _SECONDS_MAX:
        unit = "seconds" if unit_s == 1.0 else "milliseconds"
        limit = f"{_SECONDS_MAX / unit_s:g}"
        raise InvalidRequest(f"{name} must be a number of {unit}, more than 0 and at most {limit}", param=name)
    return value


Settle = Callable[[int], None]
"""Called once, when it is over, with the tokens that it took."""


def settle_nothing(num_tokens: int) -> None:
    pass


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """One sequence's. The anonymous one, with no objectives, is what tests and the Python interface use."""

    tenant: str = ""
    weight: float = 1.0
    objectives: Objectives = NO_OBJECTIVES
    charge: Callable[[int], Settle] | None = None
    """Called once, before it is begun, with the tokens that it is expected to take, prompt and answer together. Raises
    QuotaExceeded when they are not to be had. None: nobody counts them."""


ANONYMOUS: Final = Ticket()
"""Of all who name no tenant, have no key and ask for nothing."""
