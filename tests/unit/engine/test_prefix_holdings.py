"""Prefixes are lent and reserved by content, beside the sequences, and leave nothing behind whatever comes between."""

from __future__ import annotations

import random

import pytest

from disaggregated.block_hash import BlockHash, block_hashes
from disaggregated.engine.api import RequestKind
from disaggregated.engine.prefix_holdings import PrefixReservation
from tests.support.fake_runner import kv_of
from tests.unit.engine.engine_driver import EngineDriver

BLOCK = 4
PROMPT = list(range(1, 25))
"""Six blocks."""


def hashes(tokens: list[int]) -> list[BlockHash]:
    return list(block_hashes(tokens, BLOCK))


def decoded(driver: EngineDriver, name: str = "a", prompt: list[int] = PROMPT, max_tokens: int = 6) -> list[int]:
    """The whole conversation, after it has ended."""
    driver.submit(name, prompt, max_tokens=max_tokens)
    driver.run()
    return [*prompt, *driver.tokens[name]]


def fill(driver: EngineDriver, reservation: PrefixReservation, tokens: list[int]) -> None:
    """As a transfer would."""
    first = reservation.num_cached_blocks
    table = [0] * first + list(reservation.block_ids)
    driver.runner.fill(table, tokens[: len(table) * BLOCK], first_block=first)


def kinds(driver: EngineDriver) -> list[tuple[str, str, int]]:
    return [(entry.kind, entry.owner, entry.num_blocks) for entry in driver.engine.ledger()]


def test_a_finished_conversation_is_lent_with_its_answer_but_not_its_last_token() -> None:
    driver = EngineDriver()
    chat = decoded(driver, max_tokens=8)
    assert len(chat) == 32
    lent = driver.engine.lend("reader", hashes(chat))
    assert len(lent) == 7, "the last token was never computed, so the eighth block is not full"
    assert kinds(driver) == [("leased", "reader", 7)]
    driver.engine.check_integrity()
    driver.engine.release("reader")
    assert kinds(driver) == []


def test_lent_blocks_are_not_evicted_until_they_are_released() -> None:
    driver = EngineDriver(num_blocks=16)
    chat = decoded(driver)
    lent = driver.engine.lend("reader", hashes(chat))
    decoded(driver, "b", list(range(100, 124)))
    driver.engine.release("reader")
    assert driver.engine.lend("again", hashes(chat)) == lent
    assert driver.runner.read(lent, 28) == kv_of(chat[:28])
    driver.engine.release("again")
    driver.engine.check_integrity()


def test_a_run_may_begin_in_the_midst_of_a_conversation() -> None:
    driver = EngineDriver()
    known = hashes(decoded(driver))
    whole = driver.engine.lend("whole", known)
    driver.engine.release("whole")
    assert driver.engine.lend("tail", known[4:]) == whole[4:]


def test_blocks_of_a_sequence_that_runs_are_shared_and_outlive_it() -> None:
    driver = EngineDriver()
    driver.submit("a", PROMPT, max_tokens=6)
    for _ in range(4):
        driver.step()
    lent = driver.engine.lend("reader", hashes(PROMPT))
    assert len(lent) == 6
    driver.run()
    driver.engine.check_integrity()
    assert kinds(driver) == [("leased", "reader", 6)]
    assert driver.tokens["a"] == driver.alone("a")
    driver.engine.release("reader")


def test_blocks_of_the_host_tier_come_back_to_be_lent() -> None:
    driver = EngineDriver(num_blocks=12, num_host_slots=20)
    chat = decoded(driver)
    decoded(driver, "b", list(range(100, 132)))
    onboarded = driver.engine.statistics().onboarded_blocks_total
    lent = driver.engine.lend("reader", hashes(chat))
    assert len(lent) == 6
    assert driver.engine.statistics().onboarded_blocks_total > onboarded
    driver.engine.check_integrity()
    driver.engine.release("reader")


def test_of_what_there_is_no_room_for_the_beginning_is_lent() -> None:
    driver = EngineDriver(num_blocks=8)
    chat = decoded(driver)
    assert len(driver.engine.lend("reader", hashes(chat))) == 4
    assert driver.engine.lend("another", hashes(chat)) == (), "half of the pool is lent, which is all there is to have"
    driver.engine.release("reader")


def test_what_is_unknown_or_not_kept_is_not_lent_and_holds_nothing() -> None:
    driver = EngineDriver(enable_block_reuse=False)
    chat = decoded(driver)
    assert driver.engine.lend("reader", hashes(chat)) == ()
    assert driver.engine.lend("reader", hashes(list(range(900, 950)))) == ()
    assert kinds(driver) == []
    driver.engine.release("reader")


# Reservations.


def test_a_prefix_that_landed_is_found_by_the_prompt_that_has_it() -> None:
    driver = EngineDriver(num_blocks=20)
    reservation = driver.engine.reserve_prefix("p", hashes(PROMPT), lambda num_cached: 5)
    assert (reservation.num_cached_blocks, len(reservation.block_ids)) == (0, 5)
    assert kinds(driver) == [("reserved", "p", 5)]
    fill(driver, reservation, PROMPT)
    assert driver.engine.land_prefix("p", 5)
    assert kinds(driver) == []
    driver.submit("a", PROMPT, max_tokens=3, kind=RequestKind.PREFILL_ONLY)
    driver.run()
    assert driver.chunks["a"][0].num_cached_tokens == 20
    assert driver.tokens["a"] == driver.alone("a")[:1]


def test_only_what_is_missing_is_reserved_and_fewer_blocks_may_land() -> None:
    driver = EngineDriver(num_blocks=20, max_num_tokens=64)
    decoded(driver, "earlier", PROMPT[:9], max_tokens=1)
    asked: list[int] = []

    def num_wanted(num_cached: int) -> int:
        asked.append(num_cached)
        return 100

    reservation = driver.engine.reserve_prefix("p", hashes(PROMPT), num_wanted)
    assert asked == [2]
    assert (reservation.num_cached_blocks, len(reservation.block_ids)) == (2, 4)
    fill(driver, reservation, PROMPT)
    assert driver.engine.land_prefix("p", 1)
    driver.engine.check_integrity()
    driver.submit("a", PROMPT, max_tokens=1)
    driver.run()
    assert driver.chunks["a"][0].num_cached_tokens == 12
    assert driver.tokens["a"] == driver.alone("a")


def test_a_cancelled_reservation_is_quarantined_until_released_and_lands_nothing() -> None:
    driver = EngineDriver(num_blocks=20)
    driver.engine.reserve_prefix("p", hashes(PROMPT), lambda num_cached: 5)
    driver.engine.cancel("p")
    driver.engine.cancel("p")
    assert kinds(driver) == [("quarantined", "p", 5)]
    assert driver.engine.statistics().num_blocks_quarantined == 5
    assert not driver.engine.land_prefix("p", 5)
    assert kinds(driver) == []
    assert driver.engine.lend("reader", hashes(PROMPT)) == ()
    assert driver.num_free == 20


@pytest.mark.parametrize("num_wanted", [0, -3])
def test_who_wants_nothing_holds_nothing(num_wanted: int) -> None:
    driver = EngineDriver()
    assert driver.engine.reserve_prefix("p", hashes(PROMPT), lambda _: num_wanted).block_ids == ()
    assert kinds(driver) == []


def test_a_prefix_computed_meanwhile_is_kept_once() -> None:
    driver = EngineDriver(num_blocks=30, max_num_tokens=64)
    reservation = driver.engine.reserve_prefix("p", hashes(PROMPT), lambda _: 6)
    fill(driver, reservation, PROMPT)
    decoded(driver, max_tokens=1)
    assert driver.engine.land_prefix("p", 6)
    driver.engine.check_integrity()
    assert driver.num_free == 30
    assert len(driver.engine.lend("reader", hashes(PROMPT))) == 6


def test_prefixes_take_no_block_that_a_running_sequence_counts_on() -> None:
    driver = EngineDriver(num_blocks=8, max_num_tokens=64)
    driver.submit("a", PROMPT, max_tokens=4)
    driver.step()
    reservation = driver.engine.reserve_prefix("p", hashes(list(range(500, 540))), lambda _: 10)
    assert len(reservation.block_ids) == 1
    driver.run()
    assert driver.engine.statistics().preemptions_total == 0
    driver.engine.release("p")


@pytest.mark.parametrize("seed", range(30))
def test_nothing_is_lost_and_no_token_is_wrong_whatever_comes_between(seed: int) -> None:
    dice = random.Random(seed)
    driver = EngineDriver(num_blocks=24, num_host_slots=dice.choice([0, 12]), max_num_tokens=16)
    stems = [[dice.randrange(3, 400) for _ in range(24)] for _ in range(3)]
    open_prefixes: dict[str, list[int] | None] = {}
    for number in range(60):
        tokens = [*dice.choice(stems)[: dice.randrange(4, 25)], *(dice.randrange(3, 400) for _ in range(3))]
        match dice.choice(["submit", "lend", "reserve", "end", "step", "step"]):
            case "submit":
                driver.submit(f"s{number}", tokens, max_tokens=dice.randrange(1, 8))
            case "lend" if driver.engine.lend(f"l{number}", hashes(tokens)):
                open_prefixes[f"l{number}"] = None
            case "reserve":
                reservation = driver.engine.reserve_prefix(f"r{number}", hashes(tokens), lambda _: 4)
                if reservation.block_ids:
                    fill(driver, reservation, tokens)
                    open_prefixes[f"r{number}"] = list(reservation.block_ids)
            case "end" if open_prefixes:
                end(driver, dice, open_prefixes)
            case "step" if driver.engine.has_work:
                driver.step()
        driver.engine.check_integrity()
    while open_prefixes:
        end(driver, dice, open_prefixes)
    driver.run()
    assert kinds(driver) == []
    assert all(driver.tokens[name] == driver.alone(name) for name in driver.requests)


def end(driver: EngineDriver, dice: random.Random, open_prefixes: dict[str, list[int] | None]) -> None:
    name = dice.choice(sorted(open_prefixes))
    blocks = open_prefixes.pop(name)
    if blocks is not None and dice.random() < 0.3:
        driver.engine.cancel(name)
    if blocks is not None and dice.random() < 0.7:
        driver.engine.land_prefix(name, dice.randrange(len(blocks) + 1))
    else:
        driver.engine.release(name)
