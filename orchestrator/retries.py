"""Whether a request whose attempt failed goes on somewhere else. Pure, and the only place that decides it.

refused for want of room      wait and try again, as often as it takes: the deadline bounds it, and nothing was lost
a server or a transfer lost   go on elsewhere; bounded by losses in a row without one new token
anything else                 the client is told
"""

from __future__ import annotations

from typing import Final

from disaggregated.errors import AdmissionError, DisaggregatedError

LOSSES_MAX: Final = 8
"""In a row, without a token in between. `max_retries` of the file can only raise it: most losses are not the request's
doing, but one that takes every server down with it must come to an end."""
TRANSFER_FAILURES_MAX: Final = 2
"""After so many, the request is prefilled where it decodes."""


class RetryRule:
    def __init__(self, max_retries: int) -> None:
        self.losses_max = max(max_retries, LOSSES_MAX)

    def goes_on(self, error: DisaggregatedError, *, num_losses_in_a_row: int) -> bool:
        """`num_losses_in_a_row` includes this one."""
        if not error.retryable:
            return False
        return isinstance(error, AdmissionError) or num_losses_in_a_row <= self.losses_max
