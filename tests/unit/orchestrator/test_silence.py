from __future__ import annotations

import asyncio

import pytest

from orchestrator.silence import SilenceAlarm
from tests.support.virtual_time import VirtualTimeLoop, run_in_virtual_time


async def alarm_after(hearings_s: list[float], until_s: float) -> list[float]:
    """When the alarm went off, for a peer that is heard at `hearings_s`."""
    loop = asyncio.get_running_loop()
    went_off_s: list[float] = []
    alarm = SilenceAlarm(lambda: went_off_s.append(loop.time()), limit_s=1.0, second_chance_s=0.25)
    for hearing_s in hearings_s:
        loop.call_at(hearing_s, alarm.heard)
    await asyncio.sleep(until_s)
    alarm.close()
    return went_off_s


@pytest.mark.parametrize(("hearings_s", "expected_s"), [([], 1.0), ([0.9], 1.9), ([0.25, 0.5, 0.75, 1.0, 1.25], 2.25)])
def test_it_goes_off_a_limit_after_the_last_sign_of_life_and_once(hearings_s: list[float], expected_s: float) -> None:
    assert run_in_virtual_time(alarm_after(hearings_s, 9.0)) == [pytest.approx(expected_s)]


def test_a_peer_that_is_heard_in_time_is_never_lost() -> None:
    assert run_in_virtual_time(alarm_after([0.9 * n for n in range(1, 11)], 9.5)) == []


def test_when_it_is_we_who_were_away_the_peer_gets_a_second_chance() -> None:
    async def play() -> list[float]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        went_off_s: list[float] = []
        alarm = SilenceAlarm(lambda: went_off_s.append(loop.time()), limit_s=1.0, second_chance_s=0.25)
        loop.sleep_through(5.0)  # this process is stopped, and the timer fires late
        await asyncio.sleep(0.1)
        alarm.heard()
        await asyncio.sleep(0.8)
        assert went_off_s == []
        await asyncio.sleep(5.0)
        alarm.close()
        return went_off_s

    assert run_in_virtual_time(play()) == [pytest.approx(6.1)]
