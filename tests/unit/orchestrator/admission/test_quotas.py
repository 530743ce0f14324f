from __future__ import annotations

import math
import random

import pytest

from disaggregated.errors import QuotaExceeded
from orchestrator.admission.api_keys import ApiKey, digest_of
from orchestrator.admission.quotas import OwnLevels, Quotas


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize("seed", range(30))
def test_no_more_is_granted_than_a_full_bucket_and_what_flows_into_it(seed: int) -> None:
    """Whatever is asked when, and whatever is settled: what was really taken never runs ahead by more than one
    request's mistake."""
    chance, clock = random.Random(seed), Clock()
    limit = chance.choice([60, 600, 6000])
    key = ApiKey(name="k", digest=digest_of("x" * 20), tokens_per_minute=limit)
    quotas = Quotas(OwnLevels(), clock=clock)
    taken, mistakes = 0.0, 0.0
    for _ in range(400):
        clock.now_s += chance.expovariate(2.0)
        expected = chance.randint(1, limit // 4)
        try:
            quotas.take(key, "tokens", expected)
        except QuotaExceeded:
            continue
        really = chance.randint(0, 2 * expected)
        quotas.settle(key, "tokens", really - expected)
        taken += really
        mistakes = max(mistakes, really - expected)
        assert taken <= limit + clock.now_s * limit / 60.0 + mistakes + 1e-6


@pytest.mark.parametrize("seed", range(30))
def test_whoever_comes_back_when_it_is_told_to_is_served(seed: int) -> None:
    chance, clock = random.Random(seed), Clock()
    key = ApiKey(name="k", digest=digest_of("x" * 20), tokens_per_minute=600)
    quotas = Quotas(OwnLevels(), clock=clock)
    for _ in range(200):
        amount = chance.randint(1, 2000)
        try:
            quotas.take(key, "tokens", amount)
        except QuotaExceeded as error:
            hint_s = error.retry_after_s or math.inf
        else:
            continue
        if hint_s < 60:
            clock.now_s += hint_s
            quotas.take(key, "tokens", amount)
        else:
            clock.now_s += 3600.0


def test_a_clock_that_another_process_read_later_takes_nothing_back() -> None:
    clock = Clock()
    key = ApiKey(name="k", digest=digest_of("x" * 20), requests_per_minute=60)
    levels = OwnLevels()
    quotas = Quotas(levels, clock=clock)
    clock.now_s = 10.0
    for _ in range(60):
        quotas.take(key, "requests", 1)
    clock.now_s = 9.0
    with pytest.raises(QuotaExceeded):
        quotas.take(key, "requests", 1)
    clock.now_s = 11.0
    quotas.take(key, "requests", 1)
    with pytest.raises(QuotaExceeded):
        quotas.take(key, "requests", 1)


def test_keys_without_a_limit_are_never_asked_about() -> None:
    quotas = Quotas(OwnLevels(), clock=Clock())
    key = ApiKey(name="k", digest=digest_of("x" * 20))
    for what in ("requests", "tokens"):
        quotas.take(key, what, 1e12)
        quotas.settle(key, what, 1e12)
    assert quotas.remaining(key) == []


def test_two_keys_have_a_minute_each_and_one_key_has_one_for_each_kind() -> None:
    clock = Clock()
    quotas = Quotas(OwnLevels(), clock=clock)
    one, other = (
        ApiKey(name=name, digest=digest_of(name * 20), requests_per_minute=1, tokens_per_minute=100) for name in "ab"
    )
    for key in (one, other):
        quotas.take(key, "requests", 1)
        quotas.take(key, "tokens", 60)
        with pytest.raises(QuotaExceeded, match=f"{key.name} may take 1 requests a minute"):
            quotas.take(key, "requests", 1)
        assert [(each.what, each.limit, each.left) for each in quotas.remaining(key)] == [
            ("requests", 1, 0), ("tokens", 100, 40)
        ]  # fmt: skip
