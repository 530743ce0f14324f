from __future__ import annotations

import pytest

from disaggregated.errors import (
    ChecksumMismatch,
    DeadlineExceeded,
    DisaggregatedError,
    Draining,
    FingerprintMismatch,
    InvalidRequest,
    PoolExhausted,
    PromptTooLong,
    QueueFull,
    ServerLost,
)
from orchestrator.retries import LOSSES_MAX, RetryRule


@pytest.mark.parametrize("error", [ServerLost("x"), ChecksumMismatch("x")])
def test_a_loss_goes_on_elsewhere_until_there_were_too_many_in_a_row(error: DisaggregatedError) -> None:
    rule = RetryRule(max_retries=1)
    assert rule.goes_on(error, num_losses_in_a_row=LOSSES_MAX)
    assert not rule.goes_on(error, num_losses_in_a_row=LOSSES_MAX + 1)


@pytest.mark.parametrize("error", [PoolExhausted("x"), Draining("x"), QueueFull("x")])
def test_a_refusal_is_tried_again_for_as_long_as_it_takes(error: DisaggregatedError) -> None:
    assert RetryRule(max_retries=0).goes_on(error, num_losses_in_a_row=1000)


@pytest.mark.parametrize(
    "error",
    [kind("x") for kind in (DisaggregatedError, InvalidRequest, PromptTooLong, DeadlineExceeded, FingerprintMismatch)],
)
def test_what_would_fail_again_is_told_to_the_client(error: DisaggregatedError) -> None:
    assert not RetryRule(max_retries=100).goes_on(error, num_losses_in_a_row=0)


def test_the_files_max_retries_can_only_raise_the_bound() -> None:
    assert RetryRule(max_retries=0).losses_max == LOSSES_MAX
    assert RetryRule(max_retries=50).losses_max == 50
